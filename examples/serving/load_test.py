"""A bounded load test on the loopback: requests come at their times, whatever became of earlier ones.

Every server gets three loads, each twice the one before: half of what the swapped model with all its layers
was measured to do, as much, and twice as much.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

ROWS = 4  # of a request
LOADS = (0.5, 1.0, 2.0)  # of the capacity
TIMEOUT = 20.0  # seconds after which a request counts as hung
Review = tuple[str, str]


@dataclass
class Outcome:
    """Of one load: seconds of each request that was answered, and what became of the others.

    right, answered: rows; layers: run for them; refused: requests told 503; hung: without an answer in time;
    lost: that failed otherwise.
    """

    server: str
    load: float
    rate: float
    seconds: list[float] = field(default_factory=list)
    sent: int = 0
    right: int = 0
    answered: int = 0
    layers: int = 0
    refused: int = 0
    hung: int = 0
    lost: int = 0

    def latency(self, share: float) -> float:
        """Milliseconds that this share of the answered requests stayed within."""
        return 1e3 * float(np.quantile(self.seconds, share)) if self.seconds else float("nan")

    @property
    def score(self) -> float:
        return self.right / max(1, self.answered)

    async def ask(self, client: httpx.AsyncClient, reviews: Sequence[Review]) -> None:
        """One request, counted in exactly one way."""
        self.sent += 1
        start = time.perf_counter()
        try:
            reply = await client.post("/predict", json={"rows": [text for text, _ in reviews]})
        except httpx.TimeoutException:
            self.hung += 1
            return
        except httpx.HTTPError:
            self.lost += 1
            return
        if reply.status_code == 503:
            self.refused += 1
            return
        if reply.status_code != 200:
            self.lost += 1
            return
        self.seconds.append(time.perf_counter() - start)
        answers = reply.json()["answers"]
        self.answered += len(answers)
        self.layers += sum(answer["layers"] for answer in answers)
        self.right += sum(
            answer["label"] == label for answer, (_, label) in zip(answers, reviews, strict=True)
        )


async def send_load(url: str, outcome: Outcome, reviews: Sequence[Review], seconds: float) -> Outcome:
    """Requests at even times for ``seconds``; returns when each of them has come to its end."""
    draw = itertools.cycle(range(0, len(reviews) - ROWS + 1, ROWS))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        start, tasks = time.perf_counter(), []
        for number in range(max(1, round(seconds * outcome.rate / ROWS))):
            await asyncio.sleep(max(0.0, start + number * ROWS / outcome.rate - time.perf_counter()))
            first = next(draw)
            tasks.append(asyncio.create_task(outcome.ask(client, reviews[first : first + ROWS])))
        await asyncio.gather(*tasks)
    return outcome


async def measure_capacity(url: str, reviews: Sequence[Review], seconds: float) -> float:
    """Rows a second when the next request of each of 16 clients follows the answer to its last."""
    outcome = Outcome("capacity", 0.0, 0.0)
    end = time.perf_counter() + seconds

    async def ask_on(client: httpx.AsyncClient, first: int) -> None:
        while time.perf_counter() < end:
            await outcome.ask(client, reviews[first : first + ROWS])

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        await asyncio.gather(*(ask_on(client, ROWS * i) for i in range(16)))
    if outcome.hung or outcome.lost or not outcome.answered:
        raise RuntimeError(f"expected every request to be answered, got {outcome}")
    return outcome.answered / seconds


@contextmanager
def server(model: Path, *options: str):
    """A server in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    order = [sys.executable, "-m", "examples.serving", "serve", "--model", str(model), "--port", str(port)]
    process = subprocess.Popen([*order, *options])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"expected the server to start, got exit status {process.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError("expected the server to start within three minutes, got no answer")


def run_load_test(model: Path, output: Path, seconds: float, floor: float, threads: int) -> list[Outcome]:
    """All servers at all loads; prints a table, writes results.json and load.png into ``output``."""
    from dynplan.demo import load_reviews

    reviews = [(row["sentence1"], str(row["label"])) for row in load_reviews()[1]]
    output.mkdir(parents=True, exist_ok=True)
    moving = f"moving budget, 1 to {floor:g}"
    servers = {
        moving: ["--floor", str(floor)],
        f"fixed budget {floor:g}": ["--budget", str(floor)],
        "unmodified model": ["--unswapped"],
    }
    outcomes: list[Outcome] = []
    with server(model, "--budget", "1", "--threads", str(threads)) as url:
        capacity = asyncio.run(measure_capacity(url, reviews, seconds))
    print(f"capacity with all layers: {capacity:.0f} rows a second", flush=True)
    for name, options in servers.items():
        with server(model, *options, "--threads", str(threads)) as url:
            asyncio.run(measure_capacity(url, reviews, min(1.0, seconds)))  # warm
            for load in LOADS:
                outcome = Outcome(name, load, load * capacity)
                outcomes.append(asyncio.run(send_load(url, outcome, reviews, seconds)))
                print(f"{name}, load {load:g}: {outcome.latency(0.5):.0f} ms", flush=True)
    report(outcomes, output)
    return outcomes


def report(outcomes: Sequence[Outcome], output: Path) -> None:
    table = Table(
        "server", "load", "rows/s", "p50 ms", "p99 ms", "score", "layers", "sent", "503", "hung", "lost"
    )
    for o in outcomes:
        cells = [f"{o.load:g}", f"{o.rate:.0f}", f"{o.latency(0.5):.0f}", f"{o.latency(0.99):.0f}"]
        cells += [f"{o.score:.3f}", f"{o.layers / max(1, o.answered):.2f}"]
        table.add_row(o.server, *cells, *map(str, (o.sent, o.refused, o.hung, o.lost)))
    Console(width=130).print(table)
    rows = [
        {**asdict(o), "p50": o.latency(0.5), "p99": o.latency(0.99), "score": o.score, "seconds": None}
        for o in outcomes
    ]
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    draw(outcomes, output / "load.png")


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 7))
    for colour, name in enumerate(dict.fromkeys(o.server for o in outcomes)):
        own = [o for o in outcomes if o.server == name]
        rates = [o.rate for o in own]
        above.plot(rates, [o.latency(0.5) for o in own], f"C{colour}o-", label=f"{name}, p50")
        above.plot(rates, [o.latency(0.99) for o in own], f"C{colour}s--", label=f"{name}, p99")
        below.plot(rates, [o.score for o in own], f"C{colour}o-", label=name)
    above.set(ylabel="ms a request", xscale="log", yscale="log")
    below.set(ylabel="score of answered rows", xlabel="rows a second that come")
    for axes in (above, below):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
