"""The command line, in this process; the pipeline behind it is tested in training/."""

import json

import pytest
from typer.testing import CliRunner

from dynplan import cli

pytest_plugins = ["training.conftest"]
RUN = CliRunner()


def invoke(*arguments):
    return RUN.invoke(cli.app, [str(argument) for argument in arguments])


def failure(capsys, monkeypatch, *arguments):
    """Message and exit status as a user gets them."""
    monkeypatch.setattr("sys.argv", ["dynplan", *(str(argument) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return " ".join(capsys.readouterr().err.split()), stop.value.code


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_names_every_command():
    text = invoke("--help").output
    assert all(name in text for name in ("demo", "finetune", "evaluate", "bench", "env"))


def test_env_prints_what_a_report_needs():
    text = invoke("env").output
    for name in ("dynplan", "torch", "transformers", "build: compiler", "threads", "cuda", "cpu: "):
        assert name in text


def test_bench_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("dynplan.commands.bench.find_bench", lambda: None)
    done = invoke("bench", "--rounds", 1)
    assert done.exit_code == 0, done.output
    assert "dynplan keep-all" in done.output


def test_bench_in_a_checkout(tmp_path):
    (tmp_path / "bench_one.py").write_text("def test_one(benchmark):\n    assert benchmark(lambda: 3) == 3\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    assert invoke("bench", "--folder", tmp_path).exit_code == 0


@pytest.fixture(scope="module")
def tuned(tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    data = write(folder / "rows.jsonl", rows[:40])
    done = invoke(
        *("finetune", "--model", tiny_model, "--train", data, "--eval", data, "--output", folder / "out"),
        *(
            "--robust-epochs",
            1,
            "--planner-epochs",
            1,
            "--max-length",
            16,
            "--search-rows",
            4,
            "--threads",
            1,
        ),
    )
    assert done.exit_code == 0, done.output
    assert "best fixed subset" in done.output
    return folder


def test_evaluate_writes_the_report(tuned):
    done = invoke(
        *("evaluate", "--model", tuned / "out", "--eval", tuned / "rows.jsonl", "--budgets", "1,0.5"),
        *("--seconds", 0.01, "--report", tuned / "report", "--weights", "int8,bfloat16"),
    )
    assert done.exit_code == 0, done.output
    assert {"report.md", "paths.png", "tradeoff.png", "results.json"} <= {
        path.name for path in (tuned / "report").iterdir()
    }
    results = json.loads((tuned / "report" / "results.json").read_text())
    assert len(results["rows"]) == 10 and len(results["verdict"]) == 1
    assert [row["name"] for row in results["rows"]][6:8] == ["dynplan keep-all, int8", "planner, int8"]
    assert results["verdict"][0] in (tuned / "report" / "report.md").read_text()


def test_what_the_user_got_wrong_is_said_in_a_line(tuned, tiny_model, tmp_path, capsys, monkeypatch):
    data, out = tuned / "rows.jsonl", tuned / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"sentence1": "good", "label": 1}\n{"sentence1"\n')
    (tmp_path / "file").touch()
    finetune = ("finetune", "--model", tiny_model, "--output", tmp_path / "new", "--train")
    evaluate = ("evaluate", "--eval", data, "--model")
    for arguments, words in (
        ((*finetune, bad), "bad.jsonl:2: expected one JSON object a line"),
        (
            (*finetune, data, "--budgets", "0.5,1.5"),
            "expected numbers within 0..1, comma-separated, got '1.5'",
        ),
        ((*finetune, data, "--output", tmp_path / "file"), "expected a folder that can be written"),
        ((*finetune, data, "--output", out), "with a run in it; resume it or choose another"),
        ((*evaluate, tiny_model), "expected a folder written by `dynplan finetune`"),
        ((*evaluate, out, "--budgets", "half"), "expected numbers within 0..1"),
        ((*evaluate, out, "--weights", "int4"), "weights: expected bfloat16 or int8, comma-separated"),
    ):
        message, status = failure(capsys, monkeypatch, *arguments)
        assert words in message and status == 2, message


def test_a_checkpoint_without_planner_is_refused(tuned, tiny_model, tmp_path, capsys, monkeypatch):
    data = tuned / "rows.jsonl"
    done = invoke(
        *("finetune", "--model", tiny_model, "--train", data, "--output", tmp_path / "out", "--threads", 1),
        *("--robust-epochs", 0, "--planner-epochs", 0, "--max-length", 16, "--search-rows", 4),
    )
    assert done.exit_code == 0, done.output
    message, status = failure(capsys, monkeypatch, "evaluate", "--model", tmp_path / "out", "--eval", data)
    assert "expected a model with a planner, got policy StaticPath" in message and status == 2
