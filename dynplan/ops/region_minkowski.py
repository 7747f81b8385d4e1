"""The Minkowski mean of the region loss over more anchors than one process or one micro-batch sees.

The mean of exponent p is not additive, but it composes exactly: from the means :math:`L_i` and normalisers
:math:`M_i` of the parts,

.. math::
    L = \\Big(\\frac{\\sum_i M_i L_i^p}{\\sum_i M_i}\\Big)^{1/p}, \\qquad
    \\frac{\\partial L}{\\partial L_i} = \\frac{M_i}{\\sum_j M_j} \\Big(\\frac{L_i}{L}\\Big)^{p-1},

so that by the chain rule each part's own backward yields the gradient of the whole.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(loss: Tensor, normalizer: Tensor, p: float, group) -> Tensor:
    """The mean over the anchors of all ranks; collective, two small all-reduces, no host sync.

    Args:
        loss: () this rank's mean.
        normalizer: float64 () this rank's normaliser, as :class:`~dynplan.ops.RegionStats` gives it.
        p: exponent.
        group: process group.

    Returns:
        () the mean, the same on every rank; its gradient with respect to ``loss`` is multiplied by the number
        of ranks, so that averaging gradients over them, as ``DistributedDataParallel`` does, gives the exact
        one.
    """
    local = loss.detach().double()
    largest = local.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # The largest mean is scaled out, so that no power overflows or vanishes.
    scale = torch.where(largest > 0, largest, 1)
    sums = torch.stack([normalizer * (local / scale) ** p, normalizer])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total = torch.where(sums[1] > 0, sums[1], 1)
    mean = scale * (sums[0] / total) ** (1 / p)
    slope = (
        dist.get_world_size(group) * normalizer / total * (local / torch.where(mean > 0, mean, 1)) ** (p - 1)
    )
    return _with_slope(loss, mean, slope)


def _with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """``value``, with derivative ``slope`` with respect to ``x``."""
    return value.to(x.dtype) + slope.to(x.dtype) * (x - x.detach())


class MinkowskiAccumulator:
    """The exact Minkowski mean over the micro-batches of a gradient-accumulation step, in one pass.

    The gradient's common factor depends on the loss of all micro-batches, so it is applied last::

        accumulator = MinkowskiAccumulator(p=5.0)
        for input, target in micro_batches:
            stats = region_cross_entropy_stats(model(input), target, p=5.0)
            accumulator.add(stats.loss, stats.normalizer).backward()
        loss = accumulator.finish(model.parameters())
        optimizer.step()

    The gradients then equal those of one backward over one large batch. Every gradient is scaled, so nothing
    else may have been accumulated into them. With several ranks, leave the micro-batches' loss local (no
    ``process_group`` there), give the group here, and let ``DistributedDataParallel`` average as usual.

    Args:
        p: exponent of the losses that are added.
        process_group: a :mod:`torch.distributed` group to take the mean over, too.

    Raises:
        RuntimeError: by :meth:`finish`, where nothing was added.
    """

    def __init__(self, p: float, process_group: "dist.ProcessGroup | None" = None) -> None:
        self.p = p
        self.process_group = process_group
        self._reference: Tensor | None = None  # loss and normaliser that the sums are relative to
        self._sums: Tensor | None = None

    @property
    def started(self) -> bool:
        """Whether anything was added since the last :meth:`finish`."""
        return self._sums is not None

    def add(self, loss: Tensor, normalizer: Tensor) -> Tensor:
        """Takes one micro-batch in.

        Args:
            loss: () floating, the micro-batch's Minkowski mean.
            normalizer: () float64, its normaliser, as :class:`~dynplan.ops.RegionStats` gives it.

        Returns:
            () the scalar to call ``backward()`` on, dtype of ``loss``.
        """
        local, normalizer = loss.detach().double(), normalizer.detach().double()
        if not self.started:
            # Any common scale will do as long as it is the same on every rank. The first micro-batch's keeps
            # powers near 1 and gradients, of logits in 16 bits too, at the size they have by themselves.
            first = torch.stack([local, normalizer])
            self._reference = torch.where(first > 0, first, 1)
            if self.process_group is not None:
                dist.all_reduce(self._reference, dist.ReduceOp.MAX, self.process_group)
            self._sums = torch.zeros(2, dtype=torch.float64, device=loss.device)
        ratio, share = local / self._reference[0], normalizer / self._reference[1]
        self._sums += torch.stack([share * ratio**self.p, share])
        return _with_slope(loss, loss.detach(), share * ratio ** (self.p - 1))

    def finish(self, parameters: Iterable[Tensor]) -> Tensor:
        """Scales the gradients and starts afresh.

        Args:
            parameters: whose gradients were accumulated.

        Returns:
            () float64, the mean over everything added.

        Raises:
            RuntimeError: nothing was added.
        """
        if not self.started:
            raise RuntimeError("MinkowskiAccumulator: expected add before finish")
        ranks = 1
        if self.process_group is not None:
            ranks = dist.get_world_size(self.process_group)
            dist.all_reduce(self._sums, dist.ReduceOp.SUM, self.process_group)
        total = torch.where(self._sums[1] > 0, self._sums[1], 1)
        reference = self._reference[0]
        mean = reference * (self._sums[0] / total) ** (1 / self.p)
        positive = torch.where(mean > 0, mean, reference)
        factor = ranks / total * (reference / positive) ** (self.p - 1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad))
        self._reference = self._sums = None
        return mean
