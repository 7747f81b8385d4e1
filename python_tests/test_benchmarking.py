"""How cases are timed."""

import resource
import time
from pathlib import Path

import pytest

from dynplan.benchmarking import Timing, interleave


def test_cases_take_turns():
    order: list[str] = []
    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_settling_calls_come_before_every_measured_one_and_are_not_timed(monkeypatch):
    order: list[str] = []
    spent = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: sum(spent))

    def slow_at_first() -> None:
        spent.append(0.25 if order[-1:] == ["slow"] else 4.0)
        order.append("slow")

    cases = {"slow": slow_at_first, "other": lambda: order.append("other")}
    timings = interleave(cases, rounds=3, warmup=0, settle=1)
    assert order == ["slow", "slow", "other", "other"] * 3
    assert timings == {"slow": Timing(0.25, 0.25, 0.25, 3), "other": Timing(0.0, 0.0, 0.0, 3)}


def test_no_case_meets_the_free_pages_of_another():
    """Small blocks on the heap stay with the process when they are freed, above all under one that lives."""
    sizes: list[int] = []
    alive: list[bytes] = []

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def litter() -> None:
        blocks = [b"x" * 50_000 for _ in range(2000)]
        alive.append(b"y" * 50_000)
        sizes.append(resident())
        del blocks

    interleave({"litter": litter, "next": lambda: sizes.append(resident())}, rounds=1, warmup=0, settle=1)
    littered, settled = sizes[1:3]
    assert littered - settled > 80_000_000


def test_quantiles_of_a_timing():
    timing = Timing.of([0.3, 0.1, 0.2])
    assert timing.p50 == pytest.approx(0.2) and timing.p20 < timing.p50 < timing.p80
