"""A process per engine: libraries, thread pools and memory stay apart while rounds are interleaved."""

import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from workloads import Batch, Model

from engines import engine_class
from engines.peak import ProductPeak

PEAK = "peak"
_IDLE_WINDOW = 0.01  # seconds
_IDLE_LIMIT = 0.6


class WorkerError(RuntimeError):
    """The engine raised in its process; the text is its traceback."""


class Run(NamedTuple):
    """One timed pass over a slice of the work.

    Attributes:
        seconds: wall time inside the engine's forwards.
        operations: useful ones, of the layers that were taken.
        kept: share of token-layers taken.
        foreign: share of the processors that other processes had meanwhile.
    """

    seconds: float
    operations: float
    kept: float
    foreign: float


class Worker:
    """The parent's end: every method is a call into the process."""

    def __init__(self, engine: str, model: Model, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, engine, model, folder, threads), daemon=True
        )
        self._process.start()
        other.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            done, value = self._connection.recv()
        except EOFError as error:
            raise WorkerError(f"the process ended with status {self._process.exitcode}") from error
        if not done:
            raise WorkerError(value)
        return value


def convert(engine: str, model: Model, folder: Path) -> None:
    """Let the engine write its own form of the model, in a process that is gone afterwards.

    Raises:
        WorkerError: the converter does not take the model.
    """
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_convert, args=(sender, engine, model, folder), daemon=True)
    process.start()
    sender.close()
    try:
        problem = receiver.recv()
    except EOFError:
        problem = "the converter's process died"
    process.join()
    if problem:
        raise WorkerError(problem)
    (folder / "done").touch()


def _convert(connection: Connection, engine: str, model: Model, folder: Path) -> None:
    try:
        engine_class(engine).convert(model, folder)
        connection.send(None)
    except Exception:
        connection.send(traceback.format_exc())


def _serve(connection: Connection, engine: str, model: Model, folder: Path, threads: int) -> None:
    try:
        server = ProductPeak(model, threads) if engine == PEAK else _Server(engine, model, folder, threads)
        connection.send((True, None))
    except Exception:
        connection.send((False, traceback.format_exc()))
        return
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, getattr(server, method)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class _Server:
    """The child's end."""

    def __init__(self, engine: str, model: Model, folder: Path, threads: int) -> None:
        cls = engine_class(engine)
        for module in ("numpy", *cls.modules):
            __import__(module)
        self.before = _memory("VmRSS")
        self.model = model
        self.engine = cls(model, folder, threads)
        self.work: dict[str, list[list]] = {}

    def check(self, share: float, batches: list[Batch]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Hidden states of the real tokens (T, H), and the plan, of each batch."""
        self.engine.choose(share)
        results = []
        for batch in batches:
            hidden = self.engine.hidden(self.engine.forward(self.engine.prepare(batch)), batch)
            results.append((hidden[batch.mask.astype(bool)], self.engine.plan(batch)))
        return results

    def accept(self, order: str, work: list[list[Batch]]) -> None:
        """Take the work of one order of the sentences, in slices."""
        self.work[order] = [[(batch, self.engine.prepare(batch)) for batch in part] for part in work]

    def warm(self, share: float, order: str) -> None:
        """Meet the shapes: all of them where the engine compiles for each, else one slice."""
        self.engine.choose(share)
        parts = self.work[order] if self.engine.specialises else self.work[order][:1]
        for part in parts:
            for _, inputs in part:
                self.engine.forward(inputs)

    def run(self, share: float, order: str, index: int) -> Run:
        """Time one slice."""
        self.engine.choose(share)
        seconds = operations = kept = whole = 0.0
        began, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
        for batch, inputs in self.work[order][index]:
            start = time.perf_counter()
            output = self.engine.forward(inputs)
            seconds += time.perf_counter() - start
            del output
            cost = self.model.layer_operations(batch.lengths)
            plan = self.engine.plan(batch)
            taken = np.full(len(cost), self.model.layers) if plan is None else plan.sum(1)
            operations += float((cost * taken).sum())
            kept += float((batch.lengths * taken).sum())
            whole += float(batch.lengths.sum() * self.model.layers)
        others = _busy_seconds() - busy - (time.process_time() - own)
        capacity = (time.perf_counter() - began) * (os.cpu_count() or 1)
        _settle()
        return Run(seconds, operations, kept / whole, max(0.0, others / capacity))

    def reset_memory(self) -> None:
        """Forget the peak so far: conversion and warm-up do not count."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # then the peak is that of the process's whole life

    def memory(self) -> int | None:
        """Bytes that model and forwards added to the process at their peak; None where /proc is missing."""
        peak = _memory("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def _memory(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _busy_seconds() -> float:
    """Processor time that all processes have had since the system started; 0 where /proc is missing."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _settle() -> None:
    """Wait until this process's threads have stopped spinning, since the next engine wants the cores.

    Intel's OpenMP runtime, for one, spins for 0.2 s after its last region.
    """
    deadline = time.monotonic() + _IDLE_LIMIT
    while time.monotonic() < deadline:
        used = time.process_time()
        time.sleep(_IDLE_WINDOW)
        if time.process_time() - used < 0.1 * _IDLE_WINDOW:
            return


def limit_instructions(isa: str) -> None:
    """Keep every engine that can be told so to ``isa`` (``avx2``); call it before any of them starts.

    ONNX Runtime cannot be told.
    """
    os.environ |= {
        "ATEN_CPU_CAPABILITY": isa,
        "DYNPLAN_CPU_ISA": isa,
        "ONEDNN_MAX_CPU_ISA": isa.upper(),
        "MKL_ENABLE_INSTRUCTIONS": isa.upper(),
        "CT2_FORCE_CPU_ISA": isa.upper(),
    }
