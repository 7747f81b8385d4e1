"""The study: which runs it is made of, and a file of their results that a stopped study continues from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .data import Classes, Split, hold_out
from .train import LossOptions, Settings, describe, fit

CROSS_ENTROPY = LossOptions("cross-entropy")
REGION = LossOptions()
PLAIN_MEAN = REGION._replace(p=1.0)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class Job(NamedTuple):
    """One run of a part of the study. ``held_out``: fit on a part of train and score on the rest of it."""

    part: str
    loss: LossOptions
    settings: Settings
    seed: int
    held_out: bool = False

    def key(self) -> str:
        return json.dumps(
            [self.part, self.loss._asdict(), self.settings._asdict(), self.seed, self.held_out], default=list
        )


def learning_rate_jobs(settings: Settings) -> list[Job]:
    """The same budget for both kinds of loss: every learning rate once, scored on a slice of train."""
    return [
        Job("learning-rate", loss, settings._replace(learning_rate=rate), seed=0, held_out=True)
        for rate in LEARNING_RATES
        for loss in (CROSS_ENTROPY, REGION)
    ]


def main_jobs(settings: Settings, rates: dict[str, float], seeds: int) -> list[Job]:
    """Plain cross-entropy, the region loss with its defaults, and the region loss with a plain mean."""
    return [
        Job("main", loss, settings._replace(learning_rate=rate_for(loss, rates)), seed)
        for seed in range(seeds)
        for loss in (CROSS_ENTROPY, REGION, PLAIN_MEAN)
    ]


def ablation_losses(base: LossOptions) -> list[LossOptions]:
    """One factor changed at a time from ``base``, without the losses that the main part runs."""
    grid = {
        "p": (1.0, 2.0, 5.0),
        "kernel_size": (1, 3, 5, 7),
        "sigma": (0.5, 1.0, 2.0),
        "normalize": ("weight", "count"),
        "merge": ("logits", "probs"),
    }
    changed = [base._replace(**{name: value}) for name, values in grid.items() for value in values]
    same_as_cross_entropy = base._replace(kernel_size=1, p=1.0)
    return [
        loss for loss in dict.fromkeys(changed) if loss not in (REGION, PLAIN_MEAN, same_as_cross_entropy)
    ]


def ablation_jobs(
    part: str, base: LossOptions, settings: Settings, rates: dict[str, float], seeds: int
) -> list[Job]:
    """One factor changed at a time from ``base``, at the learning rate of ``base``."""
    settings = settings._replace(learning_rate=rate_for(base, rates))
    return [Job(part, loss, settings, seed) for seed in range(seeds) for loss in ablation_losses(base)]


def chosen_rates(rows: list[dict]) -> dict[str, float]:
    """For each kind of loss, the learning rate of the best held-out mIoU.

    Raises:
        ValueError: the learning-rate part has not been run for both kinds.
    """
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["part"] == "learning-rate":
            candidate = (row["scores"]["miou"], row["settings"]["learning_rate"])
            kind = row["loss"]["kind"]
            best[kind] = max(best.get(kind, candidate), candidate)
    missing = [loss.kind for loss in (CROSS_ENTROPY, REGION) if loss.kind not in best]
    if missing:
        raise ValueError(
            f"expected learning-rate runs of both kinds of loss, got none of {', '.join(missing)}"
        )
    return {kind: rate for kind, (_, rate) in best.items()}


def rate_for(loss: LossOptions, rates: dict[str, float]) -> float:
    """A plain mean spreads the gradient as cross-entropy does, and takes the rate chosen for that."""
    return rates[CROSS_ENTROPY.kind if loss.p == 1 else loss.kind]


def weights_path(output: Path, loss: LossOptions, seed: int) -> Path:
    """Where the main part keeps a trained network."""
    return output / "weights" / f"{describe(loss).replace(' ', '_')}-{seed}.pt"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_jobs(
    jobs: list[Job],
    path: Path,
    train: Split,
    test: Split,
    classes: Classes,
    environment: dict,
    progress: bool = True,
) -> Iterator[dict]:
    """Run the jobs that ``path`` does not hold yet, add a line to it after each, and yield the new rows."""
    done = {row["key"] for row in read_rows(path)}
    for job in jobs:
        if job.key() in done:
            continue
        fitted, scored = hold_out(train, share=0.2) if job.held_out else (train, test)
        run = fit(fitted, scored, classes, job.loss, job.settings, job.seed, progress)
        if job.part == "main":
            weights = weights_path(path.parent, job.loss, job.seed)
            weights.parent.mkdir(exist_ok=True)
            torch.save(run.model.state_dict(), weights)
        row = {"part": job.part, "key": job.key(), **run.result, **environment}
        with path.open("a") as file:
            file.write(json.dumps(row, default=list) + "\n")
        yield row
