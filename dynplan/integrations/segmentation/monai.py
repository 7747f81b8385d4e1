"""The region loss in the conventions of MONAI, which is not needed to use it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.nn.labels import check_tensor, held_loss, one_hot_labels, whole_labels


class RegionLoss(nn.Module):
    """Called as MONAI's losses are, on images and volumes: ``RegionLoss()(input, target)``.

    Args:
        include_background: False leaves the pixels of class 0 out, as anchors and in windows.
        ignore_index: label, or several, to leave out.
        **options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`; ``spacing`` is the voxel size.

    Shape:
        input (N, C, *spatial) logits; target (N, 1, *spatial) or (N, *spatial) labels, floating as MONAI's
        transforms leave them, bool or integer, or one-hot (N, C, *spatial) with C > 1. With one channel the
        loss is that of the logits (0, ``input``) and labels are 0 and 1.

    Raises:
        TypeError: an option that :class:`dynplan.nn.RegionCrossEntropyLoss` does not have (logits are
            expected and labels known by their shape, so there is no ``softmax`` or ``to_onehot_y``); on call,
            what is not a tensor.
        ValueError: on call, shapes that do not fit; soft labels and maps that are not one-hot, on CUDA as a
            device-side assertion.
    """

    def __init__(
        self, include_background: bool = True, ignore_index: int | Sequence[int] = -100, **options: Any
    ) -> None:
        super().__init__()
        ignored = list(ignore_index) if isinstance(ignore_index, Sequence) else [ignore_index]
        self.loss = held_loss({"ignore_index": ignored + [0] * (not include_background), **options})

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_tensor("input", input)
        check_tensor("target", target)
        if input.dim() >= 3 and input.shape[1] == 1:
            input = torch.cat([torch.zeros_like(input), input], dim=1)
        if target.dim() == input.dim() and target.shape[1] > 1:
            classes, channels = input.shape[1], target.shape[1]
            if channels != classes:
                raise ValueError(
                    f"RegionLoss: expected target to have 1 or {classes} channels, got {channels}"
                )
            return self.loss(input, one_hot_labels("target", target))
        return self.loss(input, whole_labels("target", target))
