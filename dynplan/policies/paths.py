"""Policies with no learned part: every layer, a path you give, a random one, a hash, the best fixed ones."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynplan.budget import leave_out_empty, whole_layers, within_budget
from dynplan.policies.base import BudgetPolicy, PlanRequest, Policy


class KeepAll(Policy):
    """Every layer for every sample: the original model, without its padding."""

    reads_hidden = False

    def plan(self, request: PlanRequest) -> Tensor:
        return torch.ones(request.batch_size, request.num_layers, dtype=torch.bool, device=request.device)


class FixedPath(Policy):
    """The plan you give.

    Args:
        keep: bool ``(L,)`` for every sample alike, or ``(B, L)`` for batches of B samples.

    Raises:
        TypeError: ``keep`` is not bool.
        ValueError: ``keep`` has neither one nor two dimensions; at the forward, it does not fit model or
            batch.
    """

    reads_hidden = False

    def __init__(self, keep: Tensor | Sequence[Any]) -> None:
        keep = torch.as_tensor(keep)
        if keep.dtype != torch.bool:
            raise TypeError(f"FixedPath: expected keep to be bool, got {keep.dtype}")
        if keep.dim() not in (1, 2):
            raise ValueError(f"FixedPath: expected keep of shape (L,) or (B, L), got {tuple(keep.shape)}")
        self.kept = keep.detach().clone()

    def plan(self, request: PlanRequest) -> Tensor:
        shape = (request.batch_size, request.num_layers)
        # Size by size: traced sizes that are compared with others become constants.
        if any(is_ != wanted for is_, wanted in zip(self.kept.shape[::-1], shape[::-1], strict=False)):
            got = tuple(self.kept.shape)
            raise ValueError(f"FixedPath: expected keep of shape {shape[1:]} or {shape}, got {got}")
        return self.kept.to(request.device, non_blocking=True).expand(shape).contiguous()

    def options(self) -> dict[str, Any]:
        return {"keep": self.kept.tolist()}


class RandomPath(BudgetPolicy):
    """A random path of its own for every sample, all of the same size give or take one layer.

    Args:
        budget: share of layer work, 0..1.
        seed: of the sequence of plans: two policies with one seed give the same plans in the same order.

    Raises:
        TypeError, ValueError: a budget that is no number, or not within 0..1.
    """

    reads_hidden = False

    def __init__(self, budget: float = 1.0, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = int(seed)
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)
        self._generators: dict[torch.device, torch.Generator] = {}

    def plan(self, request: PlanRequest) -> Tensor:
        shape = (request.batch_size, request.num_layers)
        if request.batch_size == 1 and request.device.type == "cpu":  # nobody to share with, no time to lose
            layers = range(request.num_layers)
            with self._lock:
                kept = set(self._random.sample(layers, whole_layers(self.budget_of(request), len(layers))))
            return leave_out_empty(torch.tensor([[layer in kept for layer in layers]]), request.cu_seqlens)
        with self._lock:
            generator = self._generators.get(request.device)
            if generator is None:
                generator = torch.Generator(request.device).manual_seed(self.seed)
                self._generators[request.device] = generator
            order = torch.rand(shape, generator=generator, device=request.device).argsort(1)
            tie = torch.rand(shape, generator=generator, device=request.device)
        # Rank first: everybody gets a k-th layer before anybody gets another. Ties are broken at random.
        return within_budget(tie - order.argsort(1), request.cu_seqlens, self.budget_of(request))

    def options(self) -> dict[str, Any]:
        return {"budget": self.budget, "seed": self.seed}

    def __getstate__(self) -> dict[str, Any]:
        return self.options()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class HashPath(BudgetPolicy):
    """A path that depends on the sample's tokens alone, in the manner of HashEE (arXiv 2203.01670).

    The rival with no learned part: equal sentences take equal paths, and a path never depends on the rest of
    the batch. Every sample that has tokens keeps ``floor(budget * L)`` layers.

    Args:
        budget: share of layer work, 0..1.
        seed: of the hash.

    Raises:
        TypeError, ValueError: a budget that is no number, or not within 0..1.
    """

    reads_hidden = False

    def __init__(self, budget: float = 1.0, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = int(seed)

    def plan(self, request: PlanRequest) -> Tensor:
        hashed = hash_tokens("HashPath", request, self.seed).unsqueeze(1)
        layer = torch.arange(1, request.num_layers + 1, device=request.device)
        rank = mix(hashed + layer).argsort(dim=1, stable=True).argsort(1)
        keep = rank < whole_layers(self.budget_of(request), request.num_layers)
        return leave_out_empty(keep, request.cu_seqlens)

    def options(self) -> dict[str, Any]:
        return {"budget": self.budget, "seed": self.seed}


class StaticPath(BudgetPolicy):
    """The best fixed path of each size: the rival to fear.

    Args:
        paths: size -> its layers. At a budget the largest size that fits is taken; the empty and, where
            ``paths`` holds only smaller ones, at budget 1 the full path need not be given.
        budget: share of layer work, 0..1.

    Raises:
        ValueError: a path's length differs from its size, or a layer stands twice.
    """

    reads_hidden = False

    def __init__(self, paths: Mapping[int, Sequence[int]], budget: float = 1.0) -> None:
        super().__init__(budget)
        self.paths = {int(size): tuple(sorted(map(int, layers))) for size, layers in sorted(paths.items())}
        for size, layers in self.paths.items():
            if len(set(layers)) != size or len(layers) != size:
                raise ValueError(
                    f"StaticPath: expected {size} different layers for size {size}, got {layers}"
                )

    def plan(self, request: PlanRequest) -> Tensor:
        count = whole_layers(self.budget_of(request), request.num_layers)
        keep = torch.zeros(request.batch_size, request.num_layers, dtype=torch.bool, device=request.device)
        if count == request.num_layers:
            return keep.fill_(True)
        fitting = [size for size in self.paths if size <= count]
        for layer in self.paths[fitting[-1]] if fitting else ():
            if not 0 <= layer < request.num_layers:
                raise ValueError(
                    f"StaticPath: expected layers 0..{request.num_layers - 1} for this model, got {layer}"
                )
            keep[:, layer] = True
        return leave_out_empty(keep, request.cu_seqlens)

    def options(self) -> dict[str, Any]:
        # JSON keys are strings; the constructor turns them back.
        return {
            "paths": {str(size): list(layers) for size, layers in self.paths.items()},
            "budget": self.budget,
        }


def hash_tokens(name: str, request: PlanRequest, seed: int) -> Tensor:
    """A hash of each sample's tokens, int64 ``(B,)``; ``name`` is what errors call the policy.

    Raises:
        ValueError: the model got no ``input_ids``.
    """
    if request.input_ids is None:
        raise ValueError(f"{name}: expected input_ids, got inputs_embeds")
    ids = request.input_ids.long()
    mask = request.attention_mask
    token = torch.ones_like(ids) if mask is None else (mask != 0).long()
    # The position among the sample's own tokens, so that padding, left or right, changes nothing.
    return mix((mix(ids + seed) * (2 * token.cumsum(1) + 1) * token).sum(1))


def mix(value: Tensor) -> Tensor:
    """Scrambles the bits of int64 values."""
    # SplitMix64's finaliser on int64, which wraps; the shifts are arithmetic there, which a hash may be.
    value = (value ^ (value >> 30)) * -4658895280553007687
    value = (value ^ (value >> 27)) * -7723592293110705685
    return value ^ (value >> 31)
