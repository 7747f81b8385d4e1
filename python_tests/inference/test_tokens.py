"""Workers that tokenize: in order, ahead, and replaced when they die."""

import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
from inference.conftest import make_records, write_lines

from dynplan.errors import InputError
from dynplan.inference.tokens import TokenPool
from dynplan.inference.windows import WindowReader


@pytest.fixture
def windows(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", make_records(90))
    reader = WindowReader((source,), size=10)
    return list(reader.read(0, reader.shape()))


def kill_workers() -> int:
    children = multiprocessing.active_children()
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    return len(children)


def test_a_worker_that_dies_is_replaced(plain, windows):
    want = [tokens for _, tokens in TokenPool(plain, 16, workers=0).encode(windows)]
    assert max(tokens.lengths.max() for tokens in want) == 16
    found, read = [], []

    def reading():
        for window in windows:
            read.append(window.number)
            yield window

    for window, tokens in TokenPool(plain, 16, workers=1).encode(reading()):
        if window.number == 3:
            assert kill_workers() == 1
        assert len(read) <= len(found) + 3  # no more than are asked to be ahead
        found.append((window.number, tokens))
    assert [number for number, _ in found] == list(range(9))
    for (_, tokens), expected in zip(found, want, strict=True):
        for name in ("ids", "types", "lengths"):
            np.testing.assert_array_equal(getattr(tokens, name), getattr(expected, name))
    assert not multiprocessing.active_children()


def test_workers_that_die_again_and_again_are_told_of(plain, windows):
    stop = threading.Event()

    def killer():
        while not stop.wait(0.05):
            kill_workers()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with pytest.raises(InputError, match="in.jsonl:1 and the 9 rows behind it, got 3 that died"):
            list(TokenPool(plain, 16, workers=1).encode(windows))
    finally:
        stop.set()
        thread.join()
