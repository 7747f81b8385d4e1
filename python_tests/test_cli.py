"""The command line, in this process; the pipeline behind it is tested in training/."""

import csv
import errno
import importlib.util
import json
import os

import pytest
import typer
from typer.testing import CliRunner

import dynplan
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
    assert all(name in text for name in ("demo", "finetune", "evaluate", "predict", "embed", "bench", "env"))


def test_version():
    assert invoke("--version").output == f"dynplan {dynplan.__version__}\n"


@pytest.mark.parametrize(
    "command", ["demo", "finetune", "evaluate", "study", "predict", "embed", "bench", "env"]
)
def test_help_holds_every_option_and_default(command):
    """Nothing is taken for markup, and no name is cut."""
    done = invoke(command, "--help")
    text = " ".join(done.output.split())
    for option in typer.main.get_command(cli.app).commands[command].params:
        assert all(name in text for name in option.opts), option.opts
        assert " ".join((option.help or "").split()) in text
        if isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})" in text
        assert "[" not in (option.help or "")


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
            "--planner",
            "upfront",
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
    good = {"sentence1": "good", "label": 1}
    three = write(tmp_path / "three.jsonl", [good, {**good, "label": 2}])
    pairs = write(tmp_path / "pairs.jsonl", [{**good, "sentence2": "bad"}])
    long = write(tmp_path / "long.jsonl", [{**good, "sentence1": "good " * 100}])
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
        ((*finetune, data, "--learning-rate", "nan"), "--learning-rate to be a number above 0 and up to"),
        ((*finetune, data, "--learning-rate", -1), "--learning-rate to be a number above 0 and up to"),
        ((*finetune, data, "--robust-learning-rate", "inf"), "--robust-learning-rate to be a number above 0"),
        (
            (*finetune, data, "--robust-epochs", "inf"),
            "--robust-epochs to be a number within 0..1000000, got inf",
        ),
        (
            (*finetune, data, "--robust-epochs", "nan"),
            "--robust-epochs to be a number within 0..1000000, got nan",
        ),
        (
            (*finetune, data, "--planner-epochs", -1),
            "--planner-epochs to be a number within 0..1000000, got -1",
        ),
        ((*finetune, data, "--seed", -1), "--seed to be a whole number within 0..4294967295, got -1"),
        ((*finetune, data, "--batch-size", 10**30), "--batch-size to be a whole number within 1..1048576"),
        (
            (*finetune, data, "--text", "review"),
            "expected a column 'review', got 'sentence1', 'sentence2', 'la",
        ),
        (
            (*finetune, data, "--eval", three),
            "three.jsonl: task auto: expected a label among [0, 1], got 2",
        ),
        ((*finetune, data, "--eval", pairs), "expected a second sentence in its rows if and only if --train"),
        ((*evaluate, out, "--beside", tmp_path), "model: expected a folder that can be loaded, got"),
        (
            (*evaluate, out, "--label", "stars"),
            "expected a column 'stars', got 'sentence1', 'sentence2', 'label'",
        ),
        (
            (*evaluate, out, "--max-length", 2000, "--eval", long),
            "at most the model's 32 positions, got a row of",
        ),
    ):
        message, status = failure(capsys, monkeypatch, *arguments)
        assert words in message and status == 2, message
        assert not list((tmp_path / "new").glob("*"))


def test_what_came_is_not_taken_for_markup(tmp_path, capsys, monkeypatch):
    data = tmp_path / "[red]a[/b].jsonl"
    message, _ = failure(
        *(capsys, monkeypatch, "finetune", "--model", tmp_path, "--train", data, "--output", tmp_path / "out")
    )
    assert "[red]a[/b].jsonl: expected a readable file of JSON lines, got No such file" in message


def test_a_report_without_latency(tuned):
    (tuned / "scores").mkdir()
    (tuned / "scores" / "tradeoff.png").touch()
    done = invoke(
        *("evaluate", "--model", tuned / "out", "--eval", tuned / "rows.jsonl", "--seconds", 0),
        *("--report", tuned / "scores"),
    )
    assert done.exit_code == 0, done.output
    text = (tuned / "scores" / "report.md").read_text()
    assert "latency was not measured" in text and "tradeoff" not in text
    assert not (tuned / "scores" / "tradeoff.png").exists()


def test_a_missing_extra_is_named(tuned, capsys, monkeypatch):
    find = importlib.util.find_spec
    for name, extra in (("scipy", "train"), ("matplotlib", "demo")):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda wanted, name=name: find(wanted) if wanted != name else None
        )
        message, _ = failure(
            *(capsys, monkeypatch, "evaluate", "--model", tuned, "--eval", tuned, "--report", tuned)
        )
        assert f"expected {name} to be installed, got none; run: pip install 'dynplan[{extra}]'" in message


def test_an_interruption_names_resume(tuned, tiny_model, tmp_path, monkeypatch):
    arguments = ("finetune", "--model", tiny_model, "--train", tuned / "rows.jsonl", "--output", tmp_path)
    monkeypatch.setattr("dynplan.training.recipe._Run.run", interrupt)
    done = invoke(*arguments)
    assert done.exit_code == 130 and "the same command with --resume goes on" in done.output
    monkeypatch.setattr("dynplan.training.recipe._Run.__init__", interrupt)
    done = invoke(*arguments[:-1], tmp_path / "another")
    assert done.exit_code == 130 and "interrupted before anything was trained" in done.output


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_full_disk_names_resume(tuned, tiny_model, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.serialize_file", full)
    data = tuned / "rows.jsonl"
    message, status = failure(
        *(capsys, monkeypatch, "finetune", "--model", tiny_model, "--train", data, "--output", tmp_path),
        *("--robust-epochs", 1, "--max-length", 16, "--threads", 1),
    )
    assert "expected to write it, got [Errno 28] No space left on device; with room made" in message
    assert "--resume goes on" in message and status == 2


def test_other_columns_and_what_is_said_on_the_way(tuned, tiny_model, rows, tmp_path):
    data = tmp_path / "rows.csv"
    with open(data, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("review", "stars"))
        writer.writerows((row["sentence1"], f"{row['label']}.0") for row in rows[:40])
    done = invoke(
        *("finetune", "--model", tiny_model, "--train", data, "--eval", data, "--output", tmp_path / "out"),
        *(
            "--text",
            "review",
            "--label",
            "stars",
            "--planner",
            "upfront",
            "--robust-epochs",
            1,
            "--planner-epochs",
            1,
        ),
        *("--max-length", 16, "--search-rows", 4, "--threads", 1),
    )
    assert done.exit_code == 0, done.output
    for words in (
        "task: regression, labels from 0 to 1; labels written as decimals mean regression, --task cla",
        "stage 1 of 3, robust: 3 steps",
        "stage 1 of 3, robust: epoch 1 of 1, score ",
        "stage 2 of 3, static: the best fixed subsets",
        "stage 3 of 3, planner: epoch 1 of 1, quality ",
    ):
        assert words in done.output
    assert "{" not in done.output and "█" not in done.output


def test_a_checkpoint_without_planner_is_refused(tuned, tiny_model, tmp_path, capsys, monkeypatch):
    data = tuned / "rows.jsonl"
    done = invoke(
        *("finetune", "--model", tiny_model, "--train", data, "--output", tmp_path / "out", "--threads", 1),
        *(
            "--planner",
            "upfront",
            "--robust-epochs",
            0,
            "--planner-epochs",
            0,
            "--max-length",
            16,
            "--search-rows",
            4,
        ),
    )
    assert done.exit_code == 0, done.output
    message, status = failure(capsys, monkeypatch, "evaluate", "--model", tmp_path / "out", "--eval", data)
    assert "expected a model with a planner, got policy StaticPath" in message and status == 2
