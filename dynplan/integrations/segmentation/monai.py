"""The region loss in the conventions of MONAI, which is not needed to use it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynplan.nn import RegionCrossEntropyLoss


class RegionLoss(nn.Module):
    """Called as MONAI's losses are, on images and volumes: ``RegionLoss()(input, target)``.

    Args:
        include_background: False leaves the pixels of class 0 out, as anchors and in windows.
        ignore_index: label, or several, to leave out.
        options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`; ``spacing`` is the voxel size.

    Shape:
        input (N, C, *spatial) logits; target (N, 1, *spatial) or (N, *spatial) labels, floating as MONAI's
        transforms leave them or integer, or one-hot (N, C, *spatial) with C > 1. With one channel the loss is
        that of the logits (0, ``input``) and labels are 0 and 1.
    """

    def __init__(
        self, include_background: bool = True, ignore_index: int | Sequence[int] = -100, **options
    ) -> None:
        super().__init__()
        ignored = list(ignore_index) if isinstance(ignore_index, Sequence) else [ignore_index]
        self.loss = RegionCrossEntropyLoss(ignore_index=ignored + [0] * (not include_background), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.dim() == input.dim():
            target = target.argmax(1) if target.shape[1] > 1 else target.squeeze(1)
        if target.is_floating_point() or target.dtype == torch.bool:
            target = target.long()  # integers of any width are read as they are
        if input.shape[1] == 1:
            input = torch.cat([torch.zeros_like(input), input], dim=1)
        return self.loss(input, target)
