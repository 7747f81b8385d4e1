"""The budget as a contract: which candidates a share of the layer work pays for.

Nothing here reads a device value back to the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_budget(name: str, budget: Any, argument: str = "budget") -> float:
    """A budget as a float.

    Args:
        name: of the class or function, for errors.
        budget: share of layer work, 0..1.
        argument: what errors call it.

    Returns:
        The budget.

    Raises:
        TypeError: not a number.
        ValueError: not within 0..1.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{name}: expected {argument} to be a number, got {type(budget).__name__}")
    if not 0 <= budget <= 1:
        raise ValueError(f"{name}: expected {argument} to be within 0..1, got {budget}")
    return float(budget)


def whole_layers(budget: float, amount: int) -> int:
    """Largest whole number of ``amount`` layers that ``budget`` pays for: 29 of 100 at 0.29, rounding
    notwithstanding.
    """
    return math.floor(budget * amount + 1e-6)


def admit(priority: Tensor, samples: Tensor, tokens: Tensor, sample_cap: Any, token_cap: Tensor) -> Tensor:
    """Take candidates in order of falling priority until either cap would be passed.

    Args:
        priority: float ``(N,)``; NaN counts as lowest, ties go to the lower index.
        samples: integer ``(N,)``, sample-layers that each candidate costs; negative where it saves. Costs
            that are negative must come first in order of priority.
        tokens: integer ``(N,)``, token-layers likewise.
        sample_cap: number or 0-d tensor.
        token_cap: number or 0-d tensor.

    Returns:
        bool ``(N,)``.
    """
    order = priority.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    within = (samples[order].cumsum(0) <= sample_cap) & (tokens[order].cumsum(0) <= token_cap)
    return torch.empty_like(within).scatter_(0, order, within)


def within_budget(scores: Tensor, cu_seqlens: Tensor, budget: float) -> Tensor:
    """The plan of the highest scores that the budget pays for.

    All sample-layers of the batch compete; they are taken in order of score until the next one would pass
    ``budget * B * L`` sample-layers or ``budget * T * L`` token-layers, where B leaves out samples without
    tokens. A smaller budget gives a subset of the plan.

    Args:
        scores: float ``(B, L)``; any values, NaN counts as lowest.
        cu_seqlens: int32 ``(B + 1,)``.
        budget: 0..1.

    Returns:
        bool ``(B, L)``.
    """
    batch_size, num_layers = scores.shape
    if budget >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    if batch_size == 1:
        # Tokens and samples come to the same, and a batch of one is where the time of a small operation
        # counts.
        best = scores.float().nan_to_num(nan=-math.inf).topk(whole_layers(budget, num_layers)).indices
        return leave_out_empty(torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True), cu_seqlens)
    lengths = cu_seqlens.diff().long()
    # Samples without tokens have no work to do: they go last, below any score, so that they use up no
    # sample-layers of others.
    scores = scores.float().nan_to_num(nan=-3e38, posinf=3e38, neginf=-3e38)
    scores = scores.masked_fill((lengths == 0).unsqueeze(1), -math.inf).flatten()
    keep = admit(
        scores,
        torch.ones_like(scores, dtype=torch.long),
        lengths.repeat_interleave(num_layers, output_size=scores.numel()),
        sample_cap(cu_seqlens, budget, num_layers),
        token_cap(cu_seqlens, budget, num_layers),
    )
    return leave_out_empty(keep.view(batch_size, num_layers), cu_seqlens)


def choose_paths(
    values: Tensor, paths: Tensor, cu_seqlens: Tensor, budget: float, price: float | None
) -> Tensor:
    """A path per sample from a table, within the budget.

    Every sample can afford its best path of at most ``budget * L`` layers. With a price, each also names the
    path with the best value minus price times size. Those that save by it take it as far as the others need
    what they save, the cheapest saving first; the others take it in order of value gained per layer for as
    long as what was saved and left over pays for it.

    Args:
        values: float ``(B, P)``, quality of each path for each sample; NaN counts as lowest.
        paths: bool ``(P, L)``, with an empty path among them.
        cu_seqlens: int32 ``(B + 1,)``.
        budget: 0..1.
        price: of a layer, in units of ``values``; None: no trade.

    Returns:
        bool ``(B, L)``.
    """
    batch_size, num_layers = values.shape[0], paths.shape[1]
    sizes = paths.sum(1)
    # Finite, so that a path that cannot be paid for stays below every one that can, whatever the planner
    # says.
    values = values.float().nan_to_num(nan=-3e38, posinf=3e38, neginf=-3e38)
    affordable = values.masked_fill(sizes > whole_layers(budget, num_layers), -math.inf).argmax(1)
    if price is None or batch_size == 1:
        return leave_out_empty(paths[affordable], cu_seqlens)  # nobody to trade with
    wanted = (values - price * sizes).argmax(1)
    lengths = cu_seqlens.diff().long()
    busy = lengths > 0  # samples without tokens neither spend nor save
    extra = (sizes[wanted] - sizes[affordable]) * busy
    rows = torch.arange(batch_size, device=values.device)
    gain = (values[rows, wanted] - values[rows, affordable]) / extra.abs().clamp_min(1)
    gain = gain.nan_to_num(nan=-3e38, posinf=3e38, neginf=-3e38)
    spent = sizes[affordable] * busy
    left_samples = sample_cap(cu_seqlens, budget, num_layers) - spent.sum()
    left_tokens = token_cap(cu_seqlens, budget, num_layers) - (spent * lengths).sum()
    # Saving loses value: where nobody buys (all samples alike, say) nobody saves.
    bought = extra.clamp_min(0)
    cheapest = torch.where(extra < 0, gain, -math.inf).argsort(descending=True, stable=True)
    saved = -extra.clamp_max(0)[cheapest]
    before = saved.cumsum(0) - saved
    before_tokens = (saved * lengths[cheapest]).cumsum(0) - saved * lengths[cheapest]
    needed = (before < bought.sum() - left_samples) | (before_tokens < (bought * lengths).sum() - left_tokens)
    extra = torch.where(torch.empty_like(busy).scatter_(0, cheapest, needed), extra, bought)
    wanted = torch.where(extra == 0, affordable, wanted)
    priority = torch.where(extra > 0, gain, math.inf)
    trade = admit(priority, extra, extra * lengths, left_samples, left_tokens)
    return paths[torch.where(trade, wanted, affordable)] & busy.unsqueeze(1)


def leave_out_empty(plan: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The plan, bool ``(B, L)``, without layers for samples that have no tokens: they have no work to do, and
    :func:`sample_cap` does not count them.
    """
    lengths = cu_seqlens[1:] if plan.shape[0] == 1 else cu_seqlens.diff()
    return plan & (lengths > 0).unsqueeze(1)


def sample_cap(cu_seqlens: Tensor, budget: float, num_layers: int) -> Tensor:
    """Sample-layers that ``budget`` pays for.

    Samples without tokens do not count: a captured graph's batch is filled up with them, and must not have
    more to spend for it.
    """
    busy = (cu_seqlens.diff() > 0).sum()
    return ((busy * num_layers).double() * budget + 1e-6).floor()


def token_cap(cu_seqlens: Tensor, budget: float, num_layers: int) -> Tensor:
    """Token-layers that ``budget`` pays for."""
    # Both caps stay on the device: only the device knows T there. The small term undoes rounding, as
    # whole_layers does.
    return (cu_seqlens[-1].double() * (budget * num_layers) + 1e-6).floor()
