"""Tokenizing in worker processes, a few windows ahead of the model."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from dynplan.errors import InputError
from dynplan.inference.windows import Window
from dynplan.loading import load_tokenizer

_TRIES = 3  # of a window whose worker dies


@dataclass(frozen=True)
class Tokens:
    """The rows of a window end to end: ids int32 ``(T,)``, types int32 ``(T,)`` or None, lengths int64
    ``(N,)``.
    """

    ids: np.ndarray
    types: np.ndarray | None
    lengths: np.ndarray


class Encoder:
    """The tokenizer in ``folder``; rows longer than ``max_length`` tokens are cut."""

    def __init__(self, folder: Path, max_length: int):
        self.tokenizer, self.max_length = load_tokenizer(folder), max_length

    def __call__(self, firsts: list[str], seconds: list[str] | None) -> Tokens:
        if not firsts:
            return Tokens(np.empty(0, np.int32), None, np.empty(0, np.int64))
        found = self.tokenizer(
            firsts, seconds, truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        lengths = np.array([len(ids) for ids in found["input_ids"]], np.int64)
        types = found.get("token_type_ids")
        return Tokens(_flat(found["input_ids"]), None if types is None else _flat(types), lengths)


class TokenPool:
    """Tokens of windows, in order.

    Args:
        folder: of the tokenizer.
        max_length: in tokens.
        workers: processes, each with a tokenizer; 0: in this process. One that dies is replaced.
        ahead: windows that are waiting or being tokenized, for each worker.
    """

    def __init__(self, folder: Path, max_length: int, workers: int = 1, ahead: int = 2):
        self.folder, self.max_length, self.workers, self.ahead = folder, max_length, workers, ahead

    def encode(self, windows: Iterable[Window]) -> Iterator[tuple[Window, Tokens]]:
        """Raises InputError where workers die again and again over one window, naming its rows."""
        if not self.workers:
            encoder = Encoder(self.folder, self.max_length)
            for window in windows:
                yield window, encoder(window.firsts, window.seconds)
            return
        waiting: deque[tuple[Window, Future]] = deque()
        windows, tries, pool = iter(windows), 0, self._start()
        try:
            while True:
                while len(waiting) < self.ahead * self.workers:
                    window = next(windows, None)
                    if window is None:
                        break
                    waiting.append((window, self._submit(pool, window)))
                if not waiting:
                    return
                window, future = waiting[0]
                try:
                    tokens = future.result()
                except BrokenProcessPool as error:
                    tries += 1
                    if tries == _TRIES:
                        raise InputError(
                            f"tokenizer: expected a worker to survive {window.places[0]} and the "
                            f"{len(window) - 1} rows behind it, got {_TRIES} that died"
                        ) from error
                    pool.shutdown(wait=True, cancel_futures=True)
                    pool = self._start()
                    waiting = deque((window, self._submit(pool, window)) for window, _ in waiting)
                    continue
                tries = 0
                waiting.popleft()
                yield window, tokens
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        # Forking a process that has run kernels would hand on locks that nobody opens.
        return ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_begin, initargs=(self.folder, self.max_length)
        )

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, window: Window) -> Future:
        try:
            return pool.submit(_encode, window.firsts, window.seconds)
        except BrokenProcessPool as error:  # a worker died since: told where the result is waited for
            broken: Future = Future()
            broken.set_exception(error)
            return broken


_encoder: Encoder | None = None


def _begin(folder: Path, max_length: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells the others to stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are the model's
    _encoder = Encoder(folder, max_length)


def _leave_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode(firsts: list[str], seconds: list[str] | None) -> Tokens:
    return _encoder(firsts, seconds)


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.array([item for items in lists for item in items], np.int32)
