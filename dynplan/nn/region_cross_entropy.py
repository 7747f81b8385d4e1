"""The region loss as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynplan.ops import (
    RegionStats,
    region_cross_entropy,
    region_cross_entropy_stats,
    region_cross_entropy_upsampled,
)


class RegionCrossEntropyLoss(nn.Module):
    """:func:`dynplan.ops.region_cross_entropy` with its options held, in place of
    :class:`torch.nn.CrossEntropyLoss`.

    Args:
        kernel_size, sigma, stride, p, merge, normalize: as in :func:`dynplan.ops.region_cross_entropy`.
        ignore_index, label_smoothing, reduction, spacing, process_group: as there.
        weight: (C,) floating, class weights, a buffer of the module, not part of its state dict.
        align_corners: a bool lets logits (N, C, h, w) be smaller than labels (N, H, W): they are interpolated
            inside the loss, see :func:`dynplan.ops.region_cross_entropy_upsampled`. None: sizes must be
            equal.

    Shape:
        input (N, C, *spatial), target (N, *spatial) or (N, 1, *spatial); loss () or (N, *anchors).

    Raises:
        TypeError, ValueError, IndexError: on call, as the function does.
    """

    weight: Tensor | None

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 5,
        sigma: float = 1.0,
        stride: int | Sequence[int] = 1,
        p: float = 5.0,
        merge: str = "logits",
        normalize: str = "weight",
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int | Sequence[int] = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        spacing: float | Sequence[float] = 1.0,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        align_corners: bool | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            weight = torch.tensor(weight, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        self.align_corners = align_corners
        self.options = {
            "kernel_size": kernel_size,
            "sigma": sigma,
            "stride": stride,
            "p": p,
            "merge": merge,
            "normalize": normalize,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "spacing": spacing,
            "process_group": process_group,
        }

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and labels; shapes above."""
        if self.align_corners is None:
            return region_cross_entropy(input, target, weight=self.weight, **self.options)
        return region_cross_entropy_upsampled(
            input, target, weight=self.weight, align_corners=self.align_corners, **self.options
        )

    def stats(self, input: Tensor, target: Tensor) -> RegionStats:
        """The loss and, from the same pass, its diagnostics; see
        :func:`dynplan.ops.region_cross_entropy_stats`."""
        return region_cross_entropy_stats(
            input, target, weight=self.weight, align_corners=self.align_corners, **self.options
        )

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        shown = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        return shown + (", weighted" if self.weight is not None else "")
