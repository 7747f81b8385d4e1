"""What is hoped of a machine, and whether a run met it: the last lines of the GPU benches."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dynplan.benchmarking import append_history, environment


class Bar(NamedTuple):
    """Something hoped of an H200.

    Attributes:
        name: what is measured.
        value: the worst of the run's cases; None: no case of this run measures it.
        bound: how much it may be at most, or must be at least.
        least: whether ``bound`` is a least value.
    """

    name: str
    value: float | None
    bound: float
    least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "PASS" if (self.value >= self.bound if self.least else self.value <= self.bound) else "FAIL"

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.2f}"
        side = "at least" if self.least else "at most"
        return f"{self.verdict:12}  {self.name}: {value} ({side} {self.bound})"


def report(op: str, bars: Sequence[Bar], history: Path, device: str) -> None:
    """Appends the bars to the history as ``op`` and prints them, how many are met last."""
    here = {"op": op} | environment(device)
    append_history(history, [here | bar._asdict() | {"verdict": bar.verdict} for bar in bars])
    for bar in bars:
        print(bar)
    print(f"{sum(bar.verdict == 'PASS' for bar in bars)} of {len(bars)} bars met")
