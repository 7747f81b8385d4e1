"""The study: which runs it is made of. A run is one ``train`` command in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from .losses import LossOptions

CROSS_ENTROPY = LossOptions("cross-entropy")
RIVALS = tuple(LossOptions(kind) for kind in ("weighted", "ohem", "focal", "dice", "lovasz"))
REGIONS = (
    *(LossOptions(kernel_size=5, p=p) for p in (1.0, 2.0, 3.0, 5.0)),
    *(LossOptions(kernel_size=k, p=2.0) for k in (1, 3, 7)),
    LossOptions(kernel_size=5, p=2.0, cross_entropy_share=0.5),
    LossOptions(kernel_size=5, p=3.0, warm_up=0.5),
)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class Job(NamedTuple):
    """One run. ``hold_out``: fit on four fifths of each training drive and score on the rest of it."""

    loss: LossOptions
    learning_rate: float
    epochs: int
    seed: int
    hold_out: bool

    def name(self) -> str:
        loss = "-".join(f"{value}" for value in self.loss) if self.loss.kind == "region" else self.loss.kind
        part = "held-out" if self.hold_out else "val"
        return f"{part}-{loss}-rate{self.learning_rate:g}-epochs{self.epochs}-seed{self.seed}"

    def arguments(self) -> list[str]:
        options = {**self.loss._asdict(), **self._asdict()}
        options["loss"] = options.pop("kind")
        hold_out = options.pop("hold_out")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return words + ["--hold-out"] * hold_out


def rate_jobs(epochs: int) -> list[Job]:
    """Cross-entropy at every learning rate, scored on the held-out part of train."""
    return [Job(CROSS_ENTROPY, rate, epochs, seed=0, hold_out=True) for rate in LEARNING_RATES]


def jobs_of(part: str, rate: float, epochs: int, seed: int) -> list[Job]:
    """Every loss at the rate chosen for cross-entropy: "choose" on the held-out part, "main" on val."""
    losses = (CROSS_ENTROPY, *RIVALS, *REGIONS)
    return [Job(loss, rate, epochs, seed, hold_out=part == "choose") for loss in losses]


def chosen_rate(rows: list[dict], epochs: int) -> float:
    """The learning rate of cross-entropy's best mIoU on the held-out part.

    Raises:
        ValueError: a rate has not been run.
    """
    found = {row["name"]: row for row in rows}
    names = {job.name(): job.learning_rate for job in rate_jobs(epochs)}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"expected runs of every learning rate, got none of {', '.join(missing)}")
    return names[max(names, key=lambda name: found[name]["scores"]["miou"])]


def read_rows(output: Path) -> list[dict]:
    """The scores of the finished runs below ``output``, sorted by name."""
    return [
        {"name": path.parent.name, **json.loads(path.read_text())}
        for path in sorted(output.glob("*/scores.json"))
    ]


def run_jobs(jobs: list[Job], output: Path, shared: list[str], at_once: int = 1) -> Iterator[dict]:
    """Run the jobs that ``output`` does not hold yet, ``at_once`` of them beside each other, and yield their
    rows as they end. ``shared``: arguments of all."""

    def run(job: Job) -> dict:
        folder = output / job.name()
        command = [sys.executable, "-m", "examples.segmentation", "train", f"--output={folder}"]
        subprocess.run([*command, *job.arguments(), *shared], check=True, stdout=subprocess.DEVNULL)
        return json.loads((folder / "scores.json").read_text())

    missing = [job for job in jobs if not (output / job.name() / "scores.json").exists()]
    with ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(run, job) for job in missing]
        try:
            yield from (done.result() for done in as_completed(runs))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure nothing more begins
