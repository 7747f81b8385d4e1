"""Makes the files here pytest-benchmark suites: ``pytest bench/`` times, prints, and keeps a history.

A bench takes the fixture ``measure``; the table of ratios and the history rows come from here.
"""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from dynplan.benchmarking import Timing, append_history, environment

HISTORY = Path(__file__).with_name("history")
ROWS: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("dynplan")
    group.addoption("--threads", type=int, default=2, help="threads torch may use (default 2)")
    group.addoption("--history", type=Path, default=HISTORY, help="folder of the JSON-lines history")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture
def measure(benchmark):
    """``measure(call, op=, impl=, shape=, dtype=, baseline=)``: times ``call`` as one row of the table.

    Check the result before measuring it. ``impl == baseline`` marks the rival the others are divided by.
    """

    def run(call, *, op, impl, shape, dtype, baseline, rounds=10, **extra):
        benchmark.group = f"{op} {shape} {dtype}"
        benchmark.name = impl
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
        timing = Timing.of(list(benchmark.stats.stats.data))
        row = {"op": op, "impl": impl, "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
        ROWS.append(row | {"baseline": baseline} | timing._asdict() | extra | environment())
        return timing

    return run


def pytest_sessionfinish(session):
    if not ROWS:
        return
    append_history(session.config.getoption("--history") / "cpu.jsonl", ROWS)
    base = {
        (row["op"], row["shape"], row["dtype"]): row["p50"] for row in ROWS if row["impl"] == row["baseline"]
    }
    table = Table("op", "shape", "dtype", "impl", "p20 ms", "p50 ms", "p80 ms", "of baseline")
    for row in ROWS:
        rival = base.get((row["op"], row["shape"], row["dtype"]))
        times = [f"{row[name] * 1e3:.3f}" for name in ("p20", "p50", "p80")]
        ratio = f"{row['p50'] / rival:.2f}" if rival else "-"
        table.add_row(row["op"], row["shape"], row["dtype"], row["impl"], *times, ratio)
    Console().print(table)
