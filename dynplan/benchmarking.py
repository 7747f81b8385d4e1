"""Timing on a noisy machine: interleaved rounds, percentiles, a record of what ran where."""

import ctypes
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from dynplan.files import writing

T = TypeVar("T")


class Timing(NamedTuple):
    """Seconds per call, over the rounds of one run."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """From one measurement a round."""
        quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(*quantiles.tolist(), len(seconds))


def interleave(
    cases: dict[str, Callable[[], object]], rounds: int = 10, warmup: int = 2, settle: int = 0
) -> dict[str, Timing]:
    """Times the cases in turn, A B C A B C ..., so that a change of the machine's speed meets all of them.

    Args:
        cases: name to a call without arguments.
        rounds: measured calls of each, at least 1.
        warmup: calls of each before the first measured one.
        settle: calls of each right before every measured one, so that none begins with the caches that a
            much slower case left behind. What that one freed goes back to the system before them: left to
            itself, the C library hands tens of megabytes back in the middle of some later call.

    Returns:
        A :class:`Timing` for each name, in the order given. Compare by ratio, never across runs. On CUDA a
        call is timed until the device has finished it.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, call in cases.items():
            if settle:
                _give_back_free_pages()
            for _ in range(settle):
                call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def _give_back_free_pages() -> None:
    """Returns unused pages of the heap to the system, where the C library has a call for it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def recorded(call: Callable[[], T]) -> Callable[[], T]:
    """``call`` as a CUDA graph: the device's time without Python's.

    Returns:
        A call that replays it and gives what ``call`` gave; each replay writes the same tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries set themselves up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def commit() -> str:
    """The commit of the checkout dynplan runs from, with ``+`` where it has changes, or ``unknown``."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict:
    """What a figure was measured on: device, instruction set, threads, versions, commit, UTC time."""
    from dynplan import __version__, _native

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "dynplan": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "isa": None if device == "cuda" else _native.cpu_features()["isa"],
        "threads": torch.get_num_threads(),
    }


def append_history(path: Path, rows: list[dict]) -> None:
    """Appends one JSON object a line; the folder is made. Raises WriteError where the disk is full; no row is
    half written.
    """
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                content = text.encode()
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(before)
                raise
