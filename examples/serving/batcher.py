"""Micro-batches by deadline: rows wait until a batch is full or the oldest has waited long enough."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


class Full(Exception):
    """There is no room for more rows: come back later."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    batch_rows: of a batch; wait: seconds that a row waits for others; queue_rows: that may wait, beyond those
    being run; request_rows, body_bytes: of a request; row_characters: of a row; floor: budget under load;
    idle_rows, busy_rows: rows waiting at which the budget begins to fall from 1, and where it reaches the
    floor.
    """

    batch_rows: int = 32
    wait: float = 0.01
    queue_rows: int = 256
    request_rows: int = 64
    body_bytes: int = 2**20
    row_characters: int = 10_000
    floor: float = 0.5
    idle_rows: int = 16
    busy_rows: int = 96

    def __post_init__(self):
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor: expected a budget above 0 and up to 1, got {self.floor}")
        if not 0 <= self.idle_rows < self.busy_rows <= self.queue_rows:
            raise ValueError(
                "expected 0 <= idle_rows < busy_rows <= queue_rows, got "
                f"{self.idle_rows}, {self.busy_rows}, {self.queue_rows}"
            )
        if self.request_rows > self.queue_rows:
            raise ValueError(
                f"request_rows: expected at most queue_rows {self.queue_rows}, got {self.request_rows}"
            )

    def budget(self, waiting: int) -> float:
        """For a batch that finds ``waiting`` rows, its own included."""
        share = (waiting - self.idle_rows) / (self.busy_rows - self.idle_rows)
        return 1 - (1 - self.floor) * min(1.0, max(0.0, share))


@dataclass(slots=True)
class _Waiting:
    row: str
    since: float
    answer: asyncio.Future


class Batcher:
    """Runs rows in batches, one at a time, in a thread of its own.

    Args:
        run: gives an answer for every row of a batch, under a budget.
        limits: of batches and queue.
        budget: for all batches; None: follows the queue.
    """

    def __init__(
        self,
        run: Callable[[list[str], float], Sequence[Any]],
        limits: Limits,
        budget: float | None = None,
    ):
        self._run, self.limits, self._fixed = run, limits, budget
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)
        self._task: asyncio.Task | None = None
        self._closing = False
        self.budget = 1.0 if budget is None else budget

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_) -> None:
        """Takes no more rows, and answers those it has."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    async def answer(self, rows: Sequence[str]) -> list[Any]:
        """The answers, in the order of the rows. Raises :class:`Full`, and whatever ``run`` raises."""
        if self._closing or len(self._queue) + len(rows) > self.limits.queue_rows:
            raise Full
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(row, loop.time(), loop.create_future()) for row in rows]
        self._queue.extend(waiting)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(item.answer for item in waiting)))
        finally:  # who asked may have gone: nobody needs what is left
            for item in waiting:
                item.answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch(loop):
            try:
                rows = [item.row for item in batch]
                answers = await loop.run_in_executor(self._thread, self._run, rows, self.budget)
                if len(answers) != len(rows):
                    raise RuntimeError(f"expected {len(rows)} answers, got {len(answers)}")
            except Exception as error:  # the batch fails, the server goes on
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            for item, answer in zip(batch, answers, strict=True):
                if not item.answer.done():
                    item.answer.set_result(answer)

    async def _next_batch(self, loop: asyncio.AbstractEventLoop) -> list[_Waiting]:
        """Empty when there is nothing left to do for ever."""
        while True:
            while self._queue and self._queue[0].answer.done():
                self._queue.popleft()
            if self._queue and (self._closing or len(self._queue) >= self.limits.batch_rows):
                break
            if self._queue:
                left = self._queue[0].since + self.limits.wait - loop.time()
                if left <= 0:
                    break
            elif self._closing:
                return []
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left if self._queue else None)
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                pass
        found = len(self._queue)
        batch = []
        while self._queue and len(batch) < self.limits.batch_rows:
            item = self._queue.popleft()
            if not item.answer.done():
                batch.append(item)
        if self._fixed is None:
            self.budget = self.limits.budget(found)
        return batch
