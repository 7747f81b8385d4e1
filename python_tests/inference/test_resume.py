"""A run that is killed anywhere and called again gives the same bytes as one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from inference.conftest import make_records, read_lines, write_lines
from training.test_kills import FAILED, Disk, in_child

from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run
from dynplan.inference.journal import Journal

RECORDS = make_records(40)


def settings(model, source, output, **more):
    options = {"batch_size": 4, "window": 16, "workers": 0, "skip_bad": True, **more}
    return RunSettings(ModelSettings(model), (source,), output, InputColumns(key="id"), **options)


def rows_with_a_bad_one(place: Path) -> Path:
    write_lines(place, RECORDS)
    lines = place.read_text().splitlines()
    lines.insert(20, "not JSON")
    place.write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.parametrize(
    ("kind", "stream"), [("jsonl", None), ("csv.gz", None), ("parquet", None), ("jsonl", 0.5)]
)
def test_killed_at_any_file_operation(planned, leaving, tmp_path, kind, stream):
    source = rows_with_a_bad_one(tmp_path / "in.jsonl")
    job = settings(planned if stream is None else leaving, source, tmp_path / "work" / f"out.{kind}")
    job = replace(job, model=replace(job.model, stream_budget=stream))
    model = job.model.load()

    def work(at: int, mode: str, resume: bool) -> int:
        disk = Disk(job.output.parent, at, mode)
        disk.watch()
        try:
            run(job, resume, progress=False, model=model)
        except InputError as error:
            return FAILED if "No space left" in str(error) else 1
        finally:
            Path(tmp_path / "count").write_text(str(disk.count))
        return 0

    def fresh() -> None:
        shutil.rmtree(job.output.parent, ignore_errors=True)
        job.output.parent.mkdir()

    fresh()
    assert in_child(lambda: work(0, "count", False)) == 0
    files = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}
    assert sorted(files) == [f"out.{kind}", f"out.{kind}.bad.jsonl"]
    total = int((tmp_path / "count").read_text())
    assert total > 20
    draw = random.Random(0)
    every = [(at, mode) for at in range(1, total + 1) for mode in ("kill", "full")]
    for at, mode in draw.sample(every, 10):
        fresh()
        status = in_child(lambda at=at, mode=mode: work(at, mode, False))
        # A removal that is cut short is not noticed where only the disk is full.
        assert status == FAILED or (mode == "full" and status == 0), f"{mode} at {at}: status {status}"
        if mode == "kill":  # and once more while it goes on
            status = in_child(lambda: work(draw.randint(1, total), "kill", True))
            assert status in (0, FAILED)
        assert in_child(lambda: work(0, "count", True)) == 0, f"{mode} at {at}: not resumed"
        found = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}
        assert found == files, f"{mode} at {at}"


def test_killed_process_with_workers(planned, tmp_path):
    """From outside, at some time; its workers go with it."""
    source = write_lines(tmp_path / "in.jsonl", make_records(1200))
    whole = settings(planned, source, tmp_path / "whole.jsonl")
    run(whole, progress=False)
    output = tmp_path / "out.jsonl"
    options = ["--key", "id", "--batch-size", "4", "--window", "16", "--threads", "1"]
    order = [sys.executable, "-m", "dynplan.cli", "predict", "--model", planned, "--input", source]
    process = subprocess.Popen([*map(str, order), *options, "--output", str(output)], start_new_session=True)
    journal = Journal.folder_of(output) / "journal.json"
    deadline = time.monotonic() + 120
    while not (journal.exists() and json.loads(journal.read_text())["progress"]["windows"] > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < json.loads(journal.read_text())["progress"]["rows"] < 1200
    run(replace(whole, output=output), resume=True, progress=False)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers outlived the process that started them")


def interrupted(model, tmp_path, **more) -> RunSettings:
    """A run of 40 rows that came to a bad one."""
    source = rows_with_a_bad_one(tmp_path / "in.jsonl")
    job = settings(model, source, tmp_path / "out.jsonl", skip_bad=False, **more)
    with pytest.raises(
        InputError, match="in.jsonl:21: expected one JSON object a line, .*; --skip-bad goes on"
    ):
        run(job, progress=False)
    return job


def test_a_mended_row_is_gone_on_with(planned, tmp_path):
    job = interrupted(planned, tmp_path)
    lines = job.inputs[0].read_text().splitlines()
    assert (
        json.loads((tmp_path / "out.jsonl.unfinished" / "journal.json").read_text())["progress"]["rows"] == 16
    )
    job.inputs[0].write_text("\n".join(lines[:20] + lines[21:]) + "\n")
    with pytest.raises(InputError, match="--output: expected no unfinished run, got .*; --resume goes on"):
        run(job, progress=False)
    done = run(job, resume=True, progress=False)
    assert (done.rows, done.new) == (40, 24)
    run(replace(job, output=tmp_path / "whole.jsonl"), progress=False)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(job, resume=True, progress=False) is None


def test_other_rows_and_settings_are_refused(planned, plain, tmp_path):
    job = interrupted(planned, tmp_path)
    with pytest.raises(InputError, match=r"--resume: .* got --batch-size 8 \(it began with 4\)$"):
        run(replace(job, batch_size=8), resume=True, progress=False)
    with pytest.raises(InputError, match="--resume: expected the settings of the run .* model folder"):
        run(replace(job, model=ModelSettings(plain)), resume=True, progress=False)
    lines = job.inputs[0].read_text().splitlines()
    job.inputs[0].write_text("\n".join(lines[1:20] + lines[21:]) + "\n")
    with pytest.raises(
        InputError, match="--resume: expected the rows of .*in.jsonl as they were, got others"
    ):
        run(job, resume=True, progress=False)
    job.inputs[0].write_text(lines[0] + "\n")
    with pytest.raises(
        InputError, match="--resume: expected the rows of .*in.jsonl as they were, got others"
    ):
        run(job, resume=True, progress=False)
    (tmp_path / "out.jsonl.unfinished" / "rows").write_bytes(b"")
    with pytest.raises(InputError, match="--resume: expected [0-9]+ bytes or more in .*rows, got fewer"):
        run(job, resume=True, progress=False)


def test_what_somebody_wrote_meanwhile_stays(planned, tmp_path):
    job = replace(interrupted(planned, tmp_path), skip_bad=True)
    for path in (job.output, job.bad_path):
        path.write_text("other")
        with pytest.raises(InputError, match=f"expected no file of that name, got {path}"):
            run(job, resume=True, progress=False)
        assert path.read_text() == "other"
        path.unlink()
    assert run(job, resume=True, progress=False).rows == 40


def test_two_processes_do_not_write_one_output(planned, tmp_path):
    job = interrupted(planned, tmp_path)
    with Journal(job.output, job.bad_path, job.described(job.reader().files, 32), resume=True):
        with pytest.raises(InputError, match="--output: expected no other process at work on it"):
            run(job, resume=True, progress=False)


def test_random_paths_depend_on_the_window_alone(planned, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    job = settings(planned, source, tmp_path / "a.jsonl")
    model = job.model.load()
    run(job, progress=False, model=model)
    run(replace(job, output=tmp_path / "b.jsonl"), progress=False, model=model)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = read_lines(tmp_path / "a.jsonl")
    assert [row["path"] for row in rows[:16]] != [row["path"] for row in rows[16:32]]
