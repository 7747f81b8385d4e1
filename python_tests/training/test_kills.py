"""A run that is killed, or finds the disk full, at any file operation is resumed to the same bytes.

The test tries a few operations; `python python_tests/training/test_kills.py` tries them all, in some minutes.
"""

import errno
import io
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from transformers.utils import logging

from dynplan.training import InputError, Recipe, finetune

SMALL = Recipe(
    planner="upfront",
    robust_epochs=2,
    planner_epochs=1,
    planner_rows=16,
    menu_size=3,
    search_rows=4,
    search_swaps=0,
    max_length=8,
    learning_rate=3e-3,
)
RESULT = (
    "config.json",
    "model.safetensors",
    "dynplan.json",
    "dynplan.safetensors",
    "static.json",
    "recipe.json",
)
FAILED = 3


class Disk:
    """Counts the file operations of this process below ``folder``, and fails the one numbered ``at``.

    "kill" ends the process there, "full" has it and every later write fail.
    """

    def __init__(self, folder: Path, at: int, mode: str):
        self.folder, self.at, self.mode, self.count = str(folder), at, mode, 0

    def watch(self) -> None:
        sys.addaudithook(self._hook)
        fsync, serialize, save = os.fsync, safetensors.torch.serialize_file, torch.save

        def watched_fsync(handle):
            self.operation(writes=True)
            fsync(handle)

        def watched_serialize(tensors, filename, metadata=None):
            content = io.BytesIO(safetensors.serialize(tensors, metadata=metadata))
            self.operation(writes=True, half=(filename, content))
            serialize(tensors, filename, metadata=metadata)

        def watched_save(value, file, *arguments, **options):
            save(value, content := io.BytesIO(), *arguments, **options)
            self.operation(writes=True, half=(file, content))
            save(value, file, *arguments, **options)

        os.fsync, safetensors.torch.serialize_file, torch.save = (
            watched_fsync,
            watched_serialize,
            watched_save,
        )

    def operation(self, writes: bool, half=None) -> None:
        self.count += 1
        if self.count == self.at or (self.mode == "full" and writes and self.count > self.at > 0):
            if half is not None:  # what was written before the end
                Path(half[0]).write_bytes(half[1].getvalue()[: half[1].tell() // 2])
            if self.mode == "kill":
                os._exit(FAILED)
            if writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _hook(self, event: str, arguments: tuple) -> None:
        if event == "open":
            place, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and str(place).startswith(self.folder):
                self.operation(writes=True)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            # Trees are removed by names relative to an open folder.
            if str(arguments[0]).startswith(self.folder) or arguments[-1] != -1:
                self.operation(writes=event == "os.mkdir")


def in_child(work) -> int:
    """Exit status of ``work`` in a fork; what it prints is dropped."""
    child = os.fork()
    if not child:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(model, rows, folder, resume=False) -> None:
    finetune(model, rows, folder, recipe=SMALL, progress=False, resume=resume)


def count_operations(model, rows, folder) -> int:
    def work() -> int:
        disk = Disk(folder, 0, "count")
        disk.watch()
        run(model, rows, folder)
        count = disk.count
        (folder / "count").write_text(str(count))
        return 0

    assert in_child(work) == 0
    return int((folder / "count").read_text())


def fail_and_resume(model, rows, folder, at, mode) -> None:
    def work() -> int:
        Disk(folder, at, mode).watch()
        try:
            run(model, rows, folder)
        except InputError as error:
            return FAILED if "No space left" in str(error) else 1
        return 0

    status = in_child(work)
    # A removal that is cut short is not noticed where only the disk is full.
    assert status == FAILED or (mode == "full" and status == 0), f"{mode} at {at}: status {status}"

    def go_on() -> int:
        run(model, rows, folder, resume=True)
        return 0

    assert in_child(go_on) == 0, f"{mode} at {at}: not resumed"


def assert_same_result(folder, whole, at, mode) -> None:
    for name in RESULT:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), f"{mode} at {at}: {name} differs"
    hidden = [path.name for path in folder.rglob(".*")]
    assert not hidden, f"{mode} at {at}: left {hidden}"


def try_operations(model, rows, folder, points=None, say=lambda line: None) -> None:
    """In an order of no meaning, so that a few of them stand for all, and a fault shows up early."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    total = count_operations(model, rows, folder / "whole")
    assert total > 100
    every = [(at, mode) for at in range(1, total + 1) for mode in ("kill", "full")]
    for at, mode in random.Random(0).sample(every, points or len(every)):
        place = folder / f"{mode}-{at}"
        fail_and_resume(model, rows, place, at, mode)
        assert_same_result(place, folder / "whole", at, mode)
        shutil.rmtree(place)
        say(f"{mode} at operation {at} of {total}: resumed")


def test_resumed_after_a_failure_anywhere(tiny_model, rows, tmp_path):
    try_operations(tiny_model, rows[:20], tmp_path, points=6)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from training.conftest import make_rows, save_tiny_model

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model = save_tiny_model(Path(place) / "tiny")
        try_operations(model, make_rows()[:20], Path(place), say=print)
