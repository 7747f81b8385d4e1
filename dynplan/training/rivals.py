"""What a planner is held against, at the same exits: other ways of leaving, and what nobody can reach."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dynplan.nn.exits import Exits
from dynplan.policies import (
    ConfidenceExit,
    EntropyExit,
    HashExit,
    LearnedExit,
    PatienceExit,
    RandomExit,
)
from dynplan.training.calibration import GRID, calibrate
from dynplan.training.data import Task
from dynplan.training.exits import ExitAnswers


@torch.no_grad()
def mixture(
    exits: Exits, answers: ExitAnswers, task: Task, kind: type[HashExit] | type[RandomExit]
) -> ConfidenceExit:
    """The best mixture of two depths at each budget, for a ``kind`` that does not look at answers: a share of
    the samples, drawn by it, goes on from the one to the other."""
    every = (*exits.depths, exits.num_layers)
    means = answers.qualities(task).mean(0).tolist()
    pairs = [(low, high) for low, high in itertools.combinations(range(len(every)), 2)]
    chosen, shares = [], []
    for place in range(GRID + 1):
        layers = min(max(place / GRID * exits.num_layers, every[0]), exits.num_layers)

        def share(pair: tuple[int, int], layers: float = layers) -> float:
            low, high = every[pair[0]], every[pair[1]]
            return min((layers - low) / (high - low), 1.0)

        paid = [pair for pair in pairs if every[pair[0]] <= layers]
        best = max(paid, key=lambda pair: means[pair[0]] + share(pair) * (means[pair[1]] - means[pair[0]]))
        gains = means[best[1]] > means[best[0]]
        chosen.append(best)
        shares.append(share(best) if gains else 0.0)
    kept = list(dict.fromkeys(chosen))
    return kind(
        exits,
        1.0,
        [[every[low], every[high]] for low, high in kept],
        [kept.index(pair) for pair in chosen],
        [[share if pair == row else 0.0 for pair, share in zip(chosen, shares, strict=True)] for row in kept],
    )


def rivals(exits: Exits, answers: ExitAnswers, task: Task) -> dict[str, ConfidenceExit]:
    """Other ways of leaving, with the same exits and calibrated on the same rows, by the name they have in
    reports."""
    kinds = {"patience exit": PatienceExit}
    if task.kind != "regression":
        kinds |= {"entropy exit": EntropyExit, "learned exit": LearnedExit}
    found = {name: calibrate(exits, answers, task, kind) for name, kind in kinds.items()}
    blind = {"hash exit": HashExit, "random exit": RandomExit}
    found |= {name: mixture(exits, answers, task, kind) for name, kind in blind.items()}
    return {"fixed depth": calibrate(exits, answers, task, longest=1), **found}


def oracle(answers: ExitAnswers, task: Task, depths: Sequence[int], budget: float) -> Tensor:
    """Where whoever knows the labels would stop, ``(N,)`` places among the exits and the full path: the bound
    that no policy reaches.

    Every sample stops at the first exit, unless a later one is better for it; what is gained most cheaply is
    bought first, for as long as ``budget`` pays for it.

    Args:
        answers: of the rows.
        task: of the labels.
        depths: of the exits, the full path's last.
        budget: share of layer work, 0..1.
    """
    if task.kind == "regression":
        worth = answers.qualities(task)
    else:
        worth = (answers.logits.argmax(2) == answers.labels.unsqueeze(1)).float()
    steps = []
    for row, values in enumerate(worth.tolist()):
        here = 0
        while True:  # along the upper hull, so that what is cheapest comes first
            rises = [
                ((values[place] - values[here]) / (depths[place] - depths[here]), place)
                for place in range(here + 1, len(depths))
                if values[place] > values[here]
            ]
            if not rises:
                break
            rise, place = max(rises)
            steps.append((rise, row, place, depths[place] - depths[here]))
            here = place
    room = budget * depths[-1] * len(worth) - depths[0] * len(worth) + 1e-6
    stops = torch.zeros(len(worth), dtype=torch.long)
    for _, row, place, cost in sorted(steps, key=lambda step: -step[0]):
        room -= cost
        if room < 0:
            break
        stops[row] = place
    return stops
