"""Learned planners: small modules that look at a sample and score its layers.

The planners read the packed hidden states that the encoder works on and give scores; turning scores into a
plan that honours a budget is the work of :class:`dynplan.policies.PlannerPolicy`. The idea of a planning
module that chooses a layer path per sample is that of Wu and Zhuo (arXiv 2308.00108); what it reads, its size
and how the budget enters are choices made here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynplan.budget import whole_layers

_QUANTILES = 256
_LARGEST_PLANNER = 2**27  # half a gigabyte in float32, far beyond any planner of use
_LARGEST_SIZE = {"num_layers": 2**12}  # each is a module of its own
_MOST_PATHS = 2**16


def pool(hidden: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    """Mean or maximum over each sample's rows of a packed tensor.

    Args:
        hidden: float ``(T, H)``; rows beyond ``cu_seqlens[-1]`` are not read.
        cu_seqlens: int32 ``(B + 1,)``.
        kind: "mean" or "max".

    Returns:
        ``(B, H)``; zeros for a sample without rows.
    """
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        # Three to ten times faster than segment_reduce here. embedding_bag would be no slower, but with rows
        # beyond the last offset it writes out of bounds (torch 2.13).
        lengths = cu_seqlens.diff().tolist()
        parts = hidden[: sum(lengths)].split(lengths)
        reduce = torch.mean if kind == "mean" else torch.amax
        pooled = [reduce(part, 0) if len(part) else part.new_zeros(part.shape[1]) for part in parts]
        return torch.stack(pooled) if pooled else hidden.new_zeros(0, hidden.shape[1])
    return _pool_without_host(hidden, cu_seqlens, kind)


def _pool_without_host(hidden: Tensor, cu_seqlens: Tensor, kind: str) -> Tensor:
    """:func:`pool` with no size on the host."""
    pooled = torch.segment_reduce(hidden, kind, offsets=cu_seqlens, axis=0, unsafe=True)
    return pooled.masked_fill((cu_seqlens.diff() == 0).unsqueeze(1), 0)


class UpfrontPlanner(nn.Module):
    """Scores the whole path of every sample from one look at the embeddings.

    In the manner of DPBERT (arXiv 2308.00108), whose planner is not published. What it looks at: mean and
    maximum of a sample's packed embeddings and the logarithm of its length. In *layer mode*
    (``paths=None``) the budget is a feature too and the output is one score per layer. In *path mode* the
    output is the expected quality of each path of a table, whatever the budget; the policy then trades
    quality against cost.

    The last layer starts at zero, so a fresh planner gives :attr:`prior` to every sample: see
    :meth:`start_from`.

    Args:
        hidden_size: ``H`` of the encoder.
        num_layers: ``L`` of the encoder.
        width: units of the one hidden layer.
        paths: bool ``(P, L)``, or a sequence of layer tuples: the paths to choose from. The empty path is
            added in front where it is missing, so that any budget can be met. They stay as they are:
            ``load_state_dict`` refuses others.
        prices: of a layer at budgets 0..1, as :meth:`calibrate` stores them.

    Raises:
        ValueError: sizes that are not positive, ``paths`` of a wrong shape, ``prices`` that are not numbers.
    """

    stepwise = False

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        width: int = 64,
        paths: Tensor | Sequence[Sequence[int]] | None = None,
        prices: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_sizes("UpfrontPlanner", hidden_size=hidden_size, num_layers=num_layers, width=width)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.width = width
        self.prices = _numbers("UpfrontPlanner", "prices", prices)
        table = None if paths is None else _path_table(paths, num_layers)
        self.register_buffer("paths", table)
        outputs = num_layers if table is None else len(table)
        self.reduce = nn.Linear(2 * hidden_size + (2 if table is None else 1), width)
        self.score = nn.Linear(width, outputs)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        # One row per path size in layer mode: the best subset of six layers need not hold the best of five.
        # In path mode, more layers are better until training says otherwise.
        self.prior = nn.Parameter(
            torch.zeros(num_layers + 1, num_layers) if table is None else table.sum(1) / num_layers
        )

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, budget: float) -> Tensor:
        """Scores of all layers, or qualities of all paths, per sample.

        Args:
            hidden: packed embeddings, float ``(T, H)``; computed in the planner's own dtype.
            cu_seqlens: int32 ``(B + 1,)``.
            budget: share of layer work, 0..1.

        Returns:
            ``(B, L)`` scores in layer mode, ``(B, P)`` qualities in path mode; higher is better.
        """
        hidden = hidden.to(self.reduce.weight.dtype)
        mean, maximum = pool(hidden, cu_seqlens, "mean"), pool(hidden, cu_seqlens, "max")
        features = [mean, maximum, (cu_seqlens.diff() + 1).to(mean.dtype).log().unsqueeze(1)]
        if self.paths is None:
            features.append(mean.new_full((mean.shape[0], 1), budget))
            prior = self.prior[whole_layers(budget, self.num_layers)]
        else:
            prior = self.prior
        return self.score(F.gelu(self.reduce(torch.cat(features, 1)))) + prior

    def _load_from_state_dict(self, state, prefix, local_metadata, strict, missing, unexpected, errors):
        # What a path costs is read from the table, and the budget's contract rests on it.
        given = state.get(prefix + "paths")
        if self.paths is not None and given is not None:
            own = self.paths.to(given.device)
            if given.dtype != own.dtype or given.shape != own.shape or not torch.equal(given, own):
                errors.append("expected paths to be the table that this planner was made with, got another")
            state[prefix + "paths"] = self.paths  # a refusal comes only after all has been assigned
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def start_from(self, paths: Mapping[int, Sequence[int]], strength: float = 1.0) -> UpfrontPlanner:
        """Set the prior of layer mode so that every sample starts on the best fixed path of each size.

        Args:
            paths: size -> layers of that size's best fixed path, as in ``StaticPath.paths``. A size that is
                not there takes the next smaller one, then the layers of the next larger one.
            strength: score of a chosen layer over one that is not; smaller lets the network overrule it
                sooner.

        Raises:
            ValueError: the planner is in path mode.
        """
        if self.paths is not None:
            raise ValueError(
                "UpfrontPlanner.start_from: expected a planner in layer mode, got one with paths"
            )
        sizes = sorted(paths)
        for size in range(self.num_layers + 1):
            row = self.prior[size].zero_()
            larger = [s for s in sizes if s > size]
            smaller = [s for s in sizes if s <= size]
            if larger:
                row[list(paths[larger[0]])] = 0.5 * strength
            if smaller:
                row[list(paths[smaller[-1]])] = strength
        return self

    @torch.no_grad()
    def calibrate(self, qualities: Tensor) -> UpfrontPlanner:
        """Store the price of a layer at each budget, for path mode.

        The price of a budget is the smallest one at which samples that each take the path with the best
        quality minus price times size spend that budget on average; 65 budgets are kept and interpolated.

        Args:
            qualities: ``(N, P)``, this planner's own output on a training set.
        """
        if self.paths is None:
            raise ValueError("UpfrontPlanner.calibrate: expected a planner with paths, got one in layer mode")
        if not qualities.numel() or not qualities.isfinite().all():
            raise ValueError(
                f"UpfrontPlanner.calibrate: expected finite qualities, got {qualities.numel()} qualities"
            )
        sizes = self.paths.sum(1).to(qualities)
        spread = float((qualities.max() - qualities.min()).clamp_min(1e-6))

        def spent(price: float) -> float:
            chosen = (qualities - price * sizes).argmax(1)
            return float(sizes[chosen].mean()) / self.num_layers

        self.prices = []
        for step in range(65):
            low, high = 0.0, spread
            for _ in range(30):
                middle = 0.5 * (low + high)
                low, high = (low, middle) if spent(middle) <= step / 64 else (middle, high)
            self.prices.append(high)
        return self

    def price(self, budget: float) -> float | None:
        """Price of a layer at ``budget``, or None before :meth:`calibrate`."""
        return None if self.prices is None else _interpolate(self.prices, budget)

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; the weights travel apart."""
        paths = None if self.paths is None else [path.nonzero().flatten().tolist() for path in self.paths]
        return {
            "type": "UpfrontPlanner",
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "width": self.width,
            "paths": paths,
            "prices": self.prices,
        }


class StepwisePlanner(nn.Module):
    """Scores one layer at a time, from the states that are about to enter it.

    In the manner of DPBERT (arXiv 2308.00108), whose planner is not published. What it looks at: mean and
    first row of each sample's packed hidden states, and the budget, through one small network per layer.
    A layer is wanted when its score reaches :meth:`threshold`, the quantile of training scores at that
    budget.

    Args:
        hidden_size: ``H`` of the encoder.
        num_layers: ``L`` of the encoder.
        width: units of each gate's hidden layer.
        thresholds: quantiles of the training scores, as :meth:`calibrate` stores them.

    Raises:
        ValueError: sizes that are not positive, ``thresholds`` that are not numbers.
    """

    stepwise = True

    def __init__(
        self, hidden_size: int, num_layers: int, width: int = 16, thresholds: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        check_sizes("StepwisePlanner", hidden_size=hidden_size, num_layers=num_layers, width=width)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.width = width
        self.thresholds = _numbers("StepwisePlanner", "thresholds", thresholds)
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * hidden_size + 1, width), nn.GELU(), nn.Linear(width, 1))
            for _ in range(num_layers)
        )

    def forward(self, layer: int, hidden: Tensor, cu_seqlens: Tensor, budget: float) -> Tensor:
        """Score of ``layer`` for every sample.

        Args:
            layer: 0-based index of the layer that ``hidden`` is about to enter.
            hidden: packed states, float ``(T, H)``; computed in the planner's own dtype.
            cu_seqlens: int32 ``(B + 1,)``.
            budget: share of layer work, 0..1.

        Returns:
            ``(B,)``, higher means rather included.
        """
        gate = self.gates[layer]
        hidden = hidden.to(gate[0].weight.dtype)
        mean = pool(hidden, cu_seqlens, "mean")
        if hidden.shape[0]:
            # An empty sample at the end would point past the last row; what it reads does not matter, it has
            # no work.
            first = hidden.index_select(0, cu_seqlens[:-1].clamp_max(hidden.shape[0] - 1))
        else:
            first = mean
        return gate(torch.cat((mean, first, mean.new_full((mean.shape[0], 1), budget)), 1)).squeeze(1)

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> StepwisePlanner:
        """Store the quantiles of ``scores`` (any shape; this planner's output on a training set)."""
        scores = scores.detach().flatten().float().sort().values
        if not scores.numel() or not scores.isfinite().all():
            raise ValueError(
                f"StepwisePlanner.calibrate: expected finite scores, got {scores.numel()} scores"
            )
        steps = torch.linspace(0, scores.numel() - 1, _QUANTILES + 1, device=scores.device)
        self.thresholds = scores[steps.round().long()].tolist()
        return self

    def threshold(self, budget: float) -> float:
        """Least score that is wanted at ``budget``; minus infinity before :meth:`calibrate` and at budget
        1."""
        if self.thresholds is None or budget >= 1:
            return -math.inf
        return _interpolate(self.thresholds, 1 - budget)

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; the weights travel apart."""
        return {
            "type": "StepwisePlanner",
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "width": self.width,
            "thresholds": self.thresholds,
        }


# What a description on disk may name.
PLANNERS: dict[str, type[nn.Module]] = {
    "UpfrontPlanner": UpfrontPlanner,
    "StepwisePlanner": StepwisePlanner,
}


def planner_from_config(config: Mapping[str, Any]) -> nn.Module:
    """Build the planner that ``to_config`` described, with fresh weights.

    Raises:
        ValueError: unknown type or arguments.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"planner_from_config: expected a mapping, got {type(config).__name__}")
    options = dict(config)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or kind not in PLANNERS:
        raise ValueError(f"planner_from_config: expected type to be one of {sorted(PLANNERS)}, got {kind!r}")
    try:
        # Without memory first: sizes that come from a file may ask for any amount of it.
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in PLANNERS[kind](**options).parameters())
        if numbers > _LARGEST_PLANNER:
            raise ValueError(
                f"planner_from_config: expected at most {_LARGEST_PLANNER} parameters, got {numbers}"
            )
        return PLANNERS[kind](**options)
    except TypeError as error:
        raise ValueError(
            f"planner_from_config: expected the arguments of {kind}, got {sorted(options)}"
        ) from error


def _interpolate(table: Sequence[float], position: float) -> float:
    place = position * (len(table) - 1)
    below = min(int(place), len(table) - 2) if len(table) > 1 else 0
    above = min(below + 1, len(table) - 1)
    return table[below] + (place - below) * (table[above] - table[below])


def _path_table(paths: Tensor | Sequence[Sequence[int]], num_layers: int) -> Tensor:
    if isinstance(paths, Tensor):
        if paths.dtype != torch.bool or paths.dim() != 2 or paths.shape[1] != num_layers:
            raise ValueError(
                f"UpfrontPlanner: expected paths to be bool of shape (P, {num_layers}), "
                f"got {paths.dtype} of shape {tuple(paths.shape)}"
            )
        table = paths.detach().cpu().clone()
    else:
        if len(paths) > _MOST_PATHS:
            raise ValueError(f"UpfrontPlanner: expected at most {_MOST_PATHS} paths, got {len(paths)}")
        table = torch.zeros(len(paths), num_layers, dtype=torch.bool, device="cpu")
        for row, layers in zip(table, paths, strict=True):
            for layer in layers:
                whole = hasattr(layer, "__index__") and not isinstance(layer, bool)
                if not whole or not 0 <= layer < num_layers:
                    raise ValueError(
                        f"UpfrontPlanner: expected paths of layers 0..{num_layers - 1}, got {layer}"
                    )
                row[layer] = True
    if not len(table) or not (table.sum(1) == 0).any():
        table = torch.cat((table.new_zeros(1, num_layers), table))
    return table


def check_sizes(name: str, **sizes: int) -> None:
    """Raises ValueError for a size that is not a positive integer, or beyond any of use."""
    for argument, value in sizes.items():
        largest = _LARGEST_SIZE.get(argument, 2**20)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected {argument} to be a positive integer, got {value!r}")
        if value > largest:
            raise ValueError(f"{name}: expected {argument} to be at most {largest}, got {value}")


def _numbers(name: str, argument: str, values: Sequence[float] | None) -> list[float] | None:
    """A table to interpolate in, or None."""
    if values is None:
        return None
    fits = isinstance(values, Sequence) and len(values) > 0 and not isinstance(values, str)
    if not fits or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    ):
        raise ValueError(f"{name}: expected {argument} to be finite numbers, got {values!r:.200}")
    return [float(value) for value in values]
