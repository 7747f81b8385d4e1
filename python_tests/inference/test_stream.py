"""A budget over all rows of a run: kept, and gone on with where a run was interrupted."""

import json
from dataclasses import replace

import pytest
from inference.conftest import make_records, read_lines, write_lines
from test_cli import failure, invoke

from dynplan import StreamBudget, from_pretrained
from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run
from dynplan.inference.journal import Journal

COUNT, LAYERS = 200, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("rows") / "in.jsonl", make_records(COUNT))


def settings(model, source, output, **more):
    model = ModelSettings(model, **{"stream_budget": 0.5, "burst": 4, **more})
    return RunSettings(
        model, (source,), output, InputColumns(key="id"), batch_size=4, window=16, workers=0
    )  # fmt: skip


def spent(output) -> list[int]:
    return [row["layers"] for row in read_lines(output)]


@pytest.mark.parametrize(("share", "burst"), [(0.25, 0), (0.5, 4), (0.6, 40)])
def test_the_contract_over_all_rows(leaving, source, tmp_path, share, burst):
    """It is used up, too: this model would run nearly all layers of all rows."""
    output = tmp_path / "out.jsonl"
    run(settings(leaving, source, output, stream_budget=share, burst=burst), progress=False)
    layers = spent(output)
    assert sum(layers) <= (share * COUNT + burst) * LAYERS + 1e-6
    assert sum(layers) > 0.8 * share * COUNT * LAYERS
    assert len(set(layers)) > 1 or share == 0.25
    starts = range(0, COUNT, 16)
    ahead = [sum(layers[: at + 16]) - share * LAYERS * min(at + 16, COUNT) for at in starts]
    assert max(ahead) <= burst * LAYERS + 1e-6  # at no time more than the burst
    if burst == 40:
        assert max(ahead) > 4 * LAYERS  # what no smaller burst would have let through


def test_an_interrupted_run_goes_on_with_what_was_left(leaving, source, tmp_path):
    whole = settings(leaving, source, tmp_path / "whole.jsonl")
    run(whole, progress=False)
    wanted = whole.output.read_bytes()
    lines = source.read_text().splitlines(keepends=True)

    def interrupted(name):
        broken = tmp_path / f"{name}-rows.jsonl"
        broken.write_text("".join([*lines[:100], "not JSON\n", *lines[100:]]))
        job = settings(leaving, broken, tmp_path / f"{name}.jsonl")
        with pytest.raises(InputError, match="rows.jsonl:101: expected one JSON object"):
            run(job, progress=False)
        broken.write_text("".join(lines))
        return job, Journal.folder_of(job.output) / "journal.json"

    def go_on(job):
        done = run(job, resume=True, progress=False)
        assert (done.rows, done.new) == (COUNT, COUNT - 96)
        return job.output.read_bytes()

    job, journal = interrupted("kept")
    stream = json.loads(journal.read_text())["progress"]["stream"]
    assert stream["samples"] == 96 and 0 < stream["sample_layers"] <= (0.5 * 96 + 4) * LAYERS
    assert go_on(job) == wanted
    # Without what was counted before, other rows get other layers.
    job, journal = interrupted("forgotten")
    said = json.loads(journal.read_text())
    said["progress"]["stream"] = None
    journal.write_text(json.dumps(said))
    assert go_on(job) != wanted
    job, journal = interrupted("damaged")
    said = json.loads(journal.read_text())
    for wrong in ({"samples": 1}, {**stream, "tokens": -1}, {**stream, "tokens": "1"}, [], 7):
        said["progress"]["stream"] = wrong
        journal.write_text(json.dumps(said))
        with pytest.raises(InputError, match="--resume: StreamBudget: expected state to map samples, .*"):
            run(job, resume=True, progress=False)


def test_a_run_is_resumed_under_its_stream(leaving, source, tmp_path):
    job = settings(leaving, source, tmp_path / "out.jsonl")
    with Journal(job.output, job.bad_path, job.described(job.reader().files, 32), resume=False):
        pass
    for more, words in (
        ({"stream_budget": 0.25}, r"model stream_budget 0.25 \(it began with 0.5\)"),
        ({"burst": 5}, r"model burst 5 \(it began with 4\)"),
        (
            {"stream_budget": None, "burst": None, "budget": 0.5},
            "model budget 0.5 .*model stream_budget None",
        ),
    ):
        with pytest.raises(InputError, match=f"--resume: expected the settings .*{words}"):
            run(settings(leaving, source, job.output, **more), resume=True, progress=False)


def test_a_saved_stream_and_one_model_for_two_runs(leaving, source, tmp_path):
    """Every run begins with a full bucket, whatever the model has seen."""
    folder = tmp_path / "saved"
    model = from_pretrained(leaving)
    model.dynplan.budget = StreamBudget(0.5, 4)
    model.save_pretrained(folder)
    for path in leaving.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    asked = settings(leaving, source, tmp_path / "asked.jsonl")
    run(asked, progress=False)
    saved = replace(asked, model=ModelSettings(folder), output=tmp_path / "saved-1.jsonl")
    loaded = saved.model.load()
    for name in ("saved-1.jsonl", "saved-2.jsonl"):
        run(replace(saved, output=tmp_path / name), progress=False, model=loaded)
        assert (tmp_path / name).read_bytes() == asked.output.read_bytes()


def test_policies_that_know_no_stream_keep_the_share(planned, source, tmp_path):
    output = tmp_path / "out.jsonl"
    run(settings(planned, source, output), progress=False)
    assert set(spent(output)) == {2}


def test_options(leaving, plain, source, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    order = ["predict", "--model", leaving, "--input", source, "--output", output, "--workers", 0]
    for more, words in (
        (
            ("--stream-budget", "0.5", "--budget", "0.4"),
            "--stream-budget: expected no --budget beside it, got --stream-budget 0.5 and --budget 0.4",
        ),
        (("--burst", "3"), "--burst: expected --stream-budget beside it, got --burst 3.0 alone"),
        (("--stream-budget", "0.5", "--burst", "1e10"), "--burst: expected a number of rows from 0 to 2**31"),
    ):
        text, status = failure(capsys, monkeypatch, *order, *more)
        assert status == 2 and words in text
    for more in (("1.5",), ("nan",), ("0.5", "--burst", "-1")):
        assert invoke(*order, "--stream-budget", *more).exit_code == 2
    for wrong in ({"stream_budget": 1.5}, {"stream_budget": float("nan")}, {"budget": -0.1}):
        with pytest.raises(InputError, match=r"budget: expected a number within 0..1, got "):
            ModelSettings(leaving, **wrong)
    text, status = failure(
        capsys, monkeypatch, *order[:2], plain, *order[3:], "--stream-budget", "0.5"
    )  # fmt: skip
    assert status == 2 and "--stream-budget: expected a model whose policy takes one, got KeepAll" in text
    assert not output.exists() and not Journal.folder_of(output).exists()
    done = invoke(*order, "--stream-budget", 0.5, "--burst", 2)
    assert done.exit_code == 0, done.output
    assert sum(spent(output)) <= (0.5 * COUNT + 2) * LAYERS
    vectors = tmp_path / "vectors.jsonl"
    order[0], order[2], order[6] = "embed", leaving, vectors
    done = invoke(*order, "--stream-budget", 0.5, "--burst", 2)
    assert done.exit_code == 0, done.output
    assert spent(vectors) == spent(output)
