"""The table of paths that a planner may choose from, picked on training data."""

import random

import torch
from torch import Tensor


def candidate_paths(
    static_paths: dict[int, tuple[int, ...]], num_layers: int, count: int, seed: int
) -> Tensor:
    """Distinct paths near the best fixed ones, bool ``(C, L)``: those themselves first, then ``count``
    variations.

    A variation exchanges one layer of a best fixed path, or adds or leaves out one, so it stays near what is
    known to be good. The full path is always there.
    """
    fixed = [frozenset(layers) for layers in static_paths.values()] + [frozenset(range(num_layers))]
    found, draw = dict.fromkeys(fixed), random.Random(seed)
    for _ in range(20 * count):
        if len(found) >= len(set(fixed)) + count:
            break
        path = set(draw.choice(fixed))
        inside, outside = sorted(path), sorted(set(range(num_layers)) - path)
        move = draw.choice(("exchange", "exchange", "add", "leave"))
        if move != "add" and inside:
            path.remove(draw.choice(inside))
        if move != "leave" and outside:
            path.add(draw.choice(outside))
        found[frozenset(path)] = None
    table = torch.zeros(len(found), num_layers, dtype=torch.bool)
    for row, path in zip(table, found, strict=True):
        row[sorted(path)] = True
    return table


def choose_menu(qualities: Tensor, paths: Tensor, size: int, fixed: int) -> Tensor:
    """Pick ``size`` paths that complement one another; the first ``fixed`` are always in.

    Paths are added one at a time, each time the one that most raises the mean, over samples and over numbers
    of layers k, of the best quality among the paths of at most k layers: what a perfect chooser would have.

    qualities: float ``(N, C)``, measured on training rows; paths: bool ``(C, L)``. Returns bool ``(size, L)``
    at most.
    """
    chosen = list(range(fixed))
    limits = torch.arange(1, paths.shape[1] + 1)
    allowed = paths.sum(1).unsqueeze(0) <= limits.unsqueeze(1)
    # (K, N): the best quality so far with at most k layers; a little below all where there is no path yet.
    best = torch.full((len(limits), len(qualities)), float(qualities.min()) - 1.0)

    def gain(index: int) -> float:
        if index in chosen:
            return float("-inf")
        return float((qualities[:, index] - best[allowed[:, index]]).clamp_min(0).sum())

    def add(index: int) -> None:
        best[allowed[:, index]] = torch.maximum(best[allowed[:, index]], qualities[:, index])

    for index in chosen:
        add(index)
    while len(chosen) < min(size, len(paths)):
        index = max(range(len(paths)), key=gain)
        chosen.append(index)
        add(index)
    return paths[chosen]
