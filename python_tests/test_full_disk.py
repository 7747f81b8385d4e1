"""A file that cannot grow, as on a full disk: a clear error, and what was there before is still there."""

import os
import resource
import traceback
from pathlib import Path

import pytest
from inference.conftest import make_records, plain, write_lines  # noqa: F401

from dynplan.benchmarking import append_history
from dynplan.errors import WriteError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run
from dynplan.policies import FixedPath, HashPath
from dynplan.policy_files import load_policy, save_policy

pytestmark = pytest.mark.usefixtures("one_thread")  # the pool of more does not live in a fork


def with_small_files(work, most: int) -> str:
    """What ``work()`` raises in a fork whose files hold at most ``most`` bytes: kind and message."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            # Python ignores SIGXFSZ, so that a write fails with EFBIG.
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            work()
            text = "nothing"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if not isinstance(error, (OSError, WriteError)):
                traceback.print_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_policy_files(tmp_path):
    policy = FixedPath([True, False, True, True])
    save_policy(tmp_path, policy)
    before = contents(tmp_path)
    text = with_small_files(lambda: save_policy(tmp_path, HashPath(0.5)), 20)
    assert text == f"OSError: [Errno 27] File too large: '{tmp_path / 'dynplan.json'}'"
    assert contents(tmp_path) == before
    assert load_policy(tmp_path)[0].to_config() == policy.to_config()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv.gz", "parquet"])
def test_predict(plain, tmp_path, kind):  # noqa: F811
    source = write_lines(tmp_path / "in.jsonl", make_records(40))

    def settings(folder: Path) -> RunSettings:
        folder.mkdir(exist_ok=True)
        options = {"batch_size": 4, "window": 8, "workers": 0}
        return RunSettings(
            ModelSettings(plain), (source,), folder / f"out.{kind}", InputColumns(key="id"), **options
        )

    whole = settings(tmp_path / "whole")
    model = whole.model.load()
    run(whole, progress=False, model=model)
    size = whole.output.stat().st_size
    for most in (0, 200, size // 2, size - 1):
        job = settings(tmp_path / f"{most}")
        text = with_small_files(lambda job=job: run(job, progress=False, model=model), most)
        assert text.startswith("WriteError: ") and "expected to write it, got " in text
        assert "File too large" in text and "\n" not in text
        assert not job.output.exists(), "half an output under its name"
        run(job, resume=True, progress=False, model=model)
        assert contents(job.output.parent) == contents(whole.output.parent)


def test_bench_history(tmp_path):
    path = tmp_path / "history.jsonl"
    append_history(path, [{"row": 1}])
    before = path.read_bytes()
    text = with_small_files(lambda: append_history(path, [{"row": 2}]), len(before) + 3)
    assert text.startswith(f"WriteError: {path}: expected to write it, got ") and "File too large" in text
    assert path.read_bytes() == before
