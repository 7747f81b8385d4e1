"""Policies: what decides, for every sample of a batch, which layers are included.

A policy turns a :class:`PlanRequest` into a plan, bool ``(B, L)``. Those that know a budget treat it as a
contract: over the batch, kept sample-layers are at most ``budget * B * L`` and kept token-layers at most
``budget * T * L``, whatever the inputs; below a budget of 1 samples without tokens keep nothing and do not
count in B. Nothing here reads a device value back to the host.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynplan.budget import (
    admit,
    check_budget,
    choose_paths,
    leave_out_empty,
    sample_cap,
    token_cap,
    whole_layers,
    within_budget,
)
from dynplan.nn.planner import planner_from_config


@dataclass(slots=True)
class PlanRequest:
    """What a policy may look at.

    Attributes:
        batch_size: ``B``.
        num_layers: ``L``.
        hidden: packed embeddings, ``(T, H)``; on CUDA rows beyond ``cu_seqlens[-1]`` hold nothing.
        cu_seqlens: int32 ``(B + 1,)``, offsets of the samples in ``hidden``.
        budget: share of layer work for this batch, 0..1, or None: the policy's own.
        input_ids: integer ``(B, S)`` as the model got them, or None (``inputs_embeds``).
        attention_mask: ``(B, S)``, nonzero at tokens, or None: all are tokens.
    """

    batch_size: int
    num_layers: int
    hidden: Tensor
    cu_seqlens: Tensor
    budget: float | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device


class Policy:
    """Base of all policies; subclass it for your own.

    A policy either plans the whole batch at once (:meth:`plan`) or, with ``stepwise = True``, one layer at a
    time (:meth:`keep`). A subclass is found again by its class name when a saved model is loaded, provided
    that its module has been imported.

    Set ``reads_hidden = False`` on an upfront policy that never looks at ``request.hidden``:
    :func:`dynplan.capture` then lets it plan outside of the CUDA graph, where it may draw random numbers, and
    one graph serves all its plans.
    """

    stepwise: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Policy]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Policy.registry[cls.__name__] = cls

    def plan(self, request: PlanRequest) -> Tensor:
        """Whole plan, bool ``(B, L)`` on the request's device."""
        raise NotImplementedError(f"{type(self).__name__}: expected plan() to be defined by the policy")

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        """Decision for ``layer``, bool ``(B,)``, of a stepwise policy.

        Args:
            layer: 0-based index of the layer.
            request: what is known of the batch.
            hidden: packed states that are about to enter the layer, ``(T, H)``.
            plan: bool ``(B, L)``, decisions so far; False from ``layer`` on.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected keep() to be defined by the policy")

    def options(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return {}

    def to_config(self) -> dict[str, Any]:
        """JSON description, read by :func:`policy_from_config`. A planner's weights travel apart."""
        return {"type": type(self).__name__, **self.options()}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Policy:
        """The policy that :meth:`options` describes."""
        return cls(**options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


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


class _BudgetPolicy(Policy):
    """A policy with a budget of its own, which the model's budget replaces."""

    takes_budget = True

    def __init__(self, budget: float = 1.0) -> None:
        self.budget = check_budget(type(self).__name__, budget)

    def budget_of(self, request: PlanRequest) -> float:
        return self.budget if request.budget is None else request.budget


class RandomPath(_BudgetPolicy):
    """A random path of its own for every sample, all of the same size give or take one layer.

    Args:
        budget: share of layer work, 0..1.
        seed: of the sequence of plans: two policies with one seed give the same plans in the same order.
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


class HashPath(_BudgetPolicy):
    """A path that depends on the sample's tokens alone, in the manner of HashEE (arXiv 2203.01670).

    The rival with no learned part: equal sentences take equal paths, and a path never depends on the rest of
    the batch. Every sample that has tokens keeps ``floor(budget * L)`` layers.

    Args:
        budget: share of layer work, 0..1.
        seed: of the hash.
    """

    reads_hidden = False

    def __init__(self, budget: float = 1.0, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = int(seed)

    def plan(self, request: PlanRequest) -> Tensor:
        if request.input_ids is None:
            raise ValueError("HashPath: expected input_ids, got inputs_embeds")
        ids = request.input_ids.long()
        mask = request.attention_mask
        token = torch.ones_like(ids) if mask is None else (mask != 0).long()
        # The position among the sample's own tokens, so that padding, left or right, changes nothing.
        tokens = _mix(ids + self.seed) * (2 * token.cumsum(1) + 1) * token
        layer = torch.arange(1, request.num_layers + 1, device=request.device)
        rank = _mix(_mix(tokens.sum(1, keepdim=True)) + layer).argsort(dim=1, stable=True).argsort(1)
        keep = rank < whole_layers(self.budget_of(request), request.num_layers)
        return leave_out_empty(keep, request.cu_seqlens)

    def options(self) -> dict[str, Any]:
        return {"budget": self.budget, "seed": self.seed}


class StaticPath(_BudgetPolicy):
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


class PlannerPolicy(_BudgetPolicy):
    """A learned planner, upfront or stepwise, held to the budget.

    Args:
        planner: :class:`dynplan.nn.UpfrontPlanner`, :class:`dynplan.nn.StepwisePlanner`, or a module with
            their interface.
        budget: share of layer work, 0..1.
    """

    def __init__(self, planner: nn.Module, budget: float = 1.0) -> None:
        super().__init__(budget)
        if not isinstance(planner, nn.Module) or not hasattr(planner, "stepwise"):
            raise TypeError(
                f"PlannerPolicy: expected planner to be a planner module, got {type(planner).__name__}"
            )
        self.planner = planner

    @property
    def stepwise(self) -> bool:
        return self.planner.stepwise

    def plan(self, request: PlanRequest) -> Tensor:
        budget = self.budget_of(request)
        planner = self._on(request.device)
        paths = getattr(planner, "paths", None)
        if paths is None and budget >= 1:
            return KeepAll().plan(request)  # whatever the scores are
        scores = planner(request.hidden, request.cu_seqlens, budget)
        if paths is None:
            return within_budget(scores, request.cu_seqlens, budget)
        return choose_paths(scores, paths, request.cu_seqlens, budget, self.planner.price(budget))

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        budget = self.budget_of(request)
        if budget >= 1:
            return torch.ones_like(plan[:, layer])  # whatever the scores are
        scores = self._on(request.device)(layer, hidden, request.cu_seqlens, budget)
        wanted = scores >= self.planner.threshold(budget)
        if len(scores) == 1:
            # As in within_budget: one sample's tokens and layers come to the same.
            spent = plan.sum() >= whole_layers(budget, plan.numel())
            return wanted & ~spent & (request.cu_seqlens[1:] > 0)
        lengths = request.cu_seqlens.diff()
        wanted &= lengths > 0
        samples = sample_cap(request.cu_seqlens, budget, request.num_layers) - plan.sum()
        tokens = token_cap(request.cu_seqlens, budget, request.num_layers)
        tokens = tokens - (plan * lengths.unsqueeze(1)).sum()
        return (
            admit(scores.masked_fill(~wanted, -math.inf), wanted.long(), lengths * wanted, samples, tokens)
            & wanted
        )

    def options(self) -> dict[str, Any]:
        return {"planner": self.planner.to_config(), "budget": self.budget}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Policy:
        return cls(**{**options, "planner": planner_from_config(options["planner"])})

    def _on(self, device: torch.device) -> nn.Module:
        # The planner is no submodule of the model, so model.to(device) does not move it.
        first = next(self.planner.parameters(), None)
        if first is not None and first.device != device:
            self.planner.to(device)
        return self.planner


def policy_from_config(config: Mapping[str, Any]) -> Policy:
    """Build the policy that ``to_config`` described; a planner gets fresh weights.

    Raises:
        ValueError: unknown type, or arguments it does not take.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in Policy.registry:
        raise ValueError(
            f"policy_from_config: expected type to be one of {sorted(Policy.registry)}, got {kind!r}; "
            "import the module that defines the policy first"
        )
    try:
        return Policy.registry[kind].from_options(options)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"policy_from_config: expected the arguments of {kind}, got {sorted(options)}"
        ) from error


def _mix(value: Tensor) -> Tensor:
    # SplitMix64's finaliser on int64, which wraps; the shifts are arithmetic there, which a hash may be.
    value = (value ^ (value >> 30)) * -4658895280553007687
    value = (value ^ (value >> 27)) * -7723592293110705685
    return value ^ (value >> 31)
