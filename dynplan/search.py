"""A short search for fixed paths that are good on training batches: the planner's baseline."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dynplan.policies import FixedPath, StaticPath


def search_static_path(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    sizes: Iterable[int],
    swaps: int = 20,
    seed: int = 0,
    progress: bool = True,
    cost: Callable[[nn.Module, list[Mapping[str, Any]]], float] | None = None,
) -> StaticPath:
    """Find a fixed path of each size with a low cost on training batches.

    Layers are left out one at a time, each time the one whose cost without it is lowest; then, for each size,
    random exchanges of a layer inside for one outside are kept where the cost falls. Each set of layers is
    tried once.

    Args:
        model: a swapped model; left as it was (policy, budget, training mode).
        batches: keyword arguments of the forward, labels included; kept in memory.
        sizes: numbers of layers, 1..L.
        swaps: exchanges tried per size.
        seed: of the exchanges.
        progress: show a progress bar.
        cost: of the model under its current policy on all of ``batches``, lower is better; without it the
            mean loss that the forward returns.

    Returns:
        :class:`~dynplan.policies.StaticPath` of the best path of each size.

    Raises:
        TypeError: the model is not swapped.
        ValueError: no batch, no loss, or a size outside 1..L.
    """
    controller = getattr(model, "dynplan", None)
    if controller is None:
        raise TypeError(
            "search_static_path: expected model to be swapped (dynplan.swap), got one that is not"
        )
    count = controller.num_layers
    batches = list(batches)
    sizes = sorted(set(sizes))
    if not batches:
        raise ValueError("search_static_path: expected at least one batch, got none")
    if not sizes or sizes[0] < 1 or sizes[-1] > count:
        raise ValueError(f"search_static_path: expected sizes within 1..{count}, got {sizes}")

    cost = cost or mean_loss
    costs: dict[tuple[int, ...], float] = {}
    removals = sum(range(sizes[0] + 1, count + 1))
    policy, budget, training = controller.policy, controller.budget, model.training
    bar = tqdm(total=removals + swaps * len(sizes), desc="static paths", disable=not progress)

    def cost_of(layers: tuple[int, ...]) -> float:
        bar.update()
        if layers not in costs:
            controller.policy = FixedPath([index in layers for index in range(count)])
            costs[layers] = cost(model, batches)
        return costs[layers]

    try:
        controller.budget = None
        model.eval()
        path = tuple(range(count))
        best = {count: path}
        while len(path) > sizes[0]:
            path = min((_without(path, layer) for layer in path), key=cost_of)
            best[len(path)] = path
        draw = random.Random(seed)
        for size in sizes:
            for _ in range(swaps if size < count else 0):
                outside = sorted(set(range(count)) - set(best[size]))
                candidate = _without(best[size], draw.choice(best[size])) + (draw.choice(outside),)
                best[size] = min(best[size], tuple(sorted(candidate)), key=cost_of)
    finally:
        bar.close()
        controller.policy, controller.budget = policy, budget
        model.train(training)
    return StaticPath({size: best[size] for size in sizes})


def _without(path: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return tuple(index for index in path if index != layer)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Mapping[str, Any]]) -> float:
    """Mean over samples of the loss that the forward returns."""
    total, samples = 0.0, 0
    for batch in batches:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                "search_static_path: expected the forward to return a loss; do the batches hold labels?"
            )
        size = len(next(iter(batch.values())))
        total += float(loss) * size
        samples += size
    return total / max(samples, 1)
