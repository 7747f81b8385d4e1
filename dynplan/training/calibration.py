"""Which exits are asked at each budget, and how sure an answer must be: chosen on held-out training rows."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from dynplan.nn.exits import Exits
from dynplan.policies import ConfidenceExit
from dynplan.training.data import Task
from dynplan.training.exits import ExitAnswers

GRID = 64  # budgets that a table knows: 0, 1/64, ..., 1
_LONGEST_CHAIN = 3
_NEARBY = 5  # places of the grid on either side


@torch.no_grad()
def calibrate(
    exits: Exits,
    answers: ExitAnswers,
    task: Task,
    kind: type[ConfidenceExit] = ConfidenceExit,
    longest: int = _LONGEST_CHAIN,
) -> ConfidenceExit:
    """A policy with tables for every budget, measured on rows that nothing was trained on.

    Temperatures minimise the loss of each exit's answers (Guo et al., arXiv 1706.04599); then every chain of
    one to three exits, the full path among them, is tried with the best threshold that each budget pays for.
    At each budget the best chain is taken, by its mean over budgets nearby, since a few hundred rows tell no
    more; where a larger budget has no better one, the chain stays. Kinds other than
    :class:`~dynplan.policies.ConfidenceExit` ask every exit, as they were published.

    Args:
        exits: whose temperatures are set, for classes.
        answers: theirs, of held-out rows.
        task: of the labels.
        kind: of the policy.
        longest: most exits of a chain; 1: one depth for all samples.
    """
    exits.to("cpu")
    if task.kind != "regression":
        exits.temperatures.copy_(torch.tensor(
            [_temperature(logits, answers.labels) for logits in answers.logits.unbind(1)]))  # fmt: skip
    qualities = answers.qualities(task)
    every = (*exits.depths, exits.num_layers)
    sureness = _sureness(kind(exits), answers)
    chains = [every]
    if kind is ConfidenceExit:
        chains = [c for size in range(1, longest + 1) for c in itertools.combinations(every, size)]
    tables = [_table(chain, every, sureness, qualities) for chain in chains]
    choice, kept = _choose(torch.tensor([scores for _, scores in tables]), chains), {}
    for index in choice:
        kept.setdefault(index, len(kept))
    return kind(
        exits,
        1.0,
        [chains[index] for index in kept],
        [kept[index] for index in choice],
        [tables[index][0] for index in kept],
    )


def _sureness(policy: ConfidenceExit, answers: ExitAnswers) -> Tensor:
    """``(N, R)``."""
    request = SimpleNamespace(memory={})  # as one forward over all rows
    pairs = zip(answers.logits.unbind(1), answers.pooled.unbind(1), strict=False)
    said = [policy.sureness(index, logits, pooled, request) for index, (logits, pooled) in enumerate(pairs)]
    return torch.stack(said, 1)


def _temperature(logits: Tensor, labels: Tensor) -> float:
    grid = torch.logspace(-1, 1, 81, base=4).tolist()  # a quarter to four
    return min(grid, key=lambda t: float(F.cross_entropy(logits / t, labels)))


def _choose(scores: Tensor, chains: list[tuple[int, ...]]) -> list[int]:
    """The chain at each budget, from scores ``(chains, budgets)``; minus infinity is not paid for."""
    paid = scores.isfinite()
    near = 2 * _NEARBY + 1

    def around(values: Tensor) -> Tensor:
        return F.avg_pool1d(values.unsqueeze(1), near, 1, _NEARBY, count_include_pad=False).squeeze(1)

    smooth = around(scores.where(paid, 0)) / around(paid.float()).clamp_min(1e-6)
    smooth = smooth.where(paid, -torch.inf)
    cheapest = min(range(len(chains)), key=lambda index: chains[index][0])
    best, choice = -torch.inf, []
    for column in smooth.unbind(1):
        index = int(column.argmax())
        if column[index] > best:
            best = float(column[index])
            choice.append(index)
        else:
            choice.append(choice[-1] if choice else cheapest)
    return choice


def _table(
    chain: tuple[int, ...], every: tuple[int, ...], sureness: Tensor, qualities: Tensor
) -> tuple[list[float], list[float]]:
    """Thresholds and mean qualities of a chain at each budget of the grid; minus infinity where the budget
    does not pay for the chain's first exit."""
    rungs = torch.tensor([every.index(depth) for depth in chain])
    rows = torch.arange(len(qualities))
    asked = sureness[:, rungs[:-1]]
    levels = asked.flatten().unique()
    if len(levels) > 257:
        levels = levels[torch.linspace(0, len(levels) - 1, 257).round().long()]
    # From nobody who goes on to all: a threshold that no answer reaches comes last.
    levels = torch.cat((levels, levels.new_full((1,), 3e38)))
    depths = torch.tensor(chain, dtype=torch.float32)
    costs, scores = [], []
    for level in levels:
        sure = torch.cat((asked >= level, torch.ones(len(rows), 1, dtype=torch.bool)), 1)
        stops = sure.int().argmax(1)
        costs.append(float(depths[stops].mean()))
        scores.append(float(qualities[rows, rungs[stops]].mean()))
    thresholds, reached = [], []
    for place in range(GRID + 1):
        paid = [i for i, cost in enumerate(costs) if cost <= place / GRID * every[-1] + 1e-6]
        best = max(paid, key=scores.__getitem__, default=None)
        thresholds.append(float(levels[0 if best is None else best]))
        reached.append(-torch.inf if best is None else scores[best])
    return thresholds, reached
