"""The region loss in the conventions of segmentation_models.pytorch, which is not needed to use it."""

import torch
from torch import Tensor, nn

from dynplan.nn import RegionCrossEntropyLoss


class RegionLoss(nn.Module):
    """Called as the library's own losses are: ``RegionLoss(mode)(y_pred, y_true)``.

    Args:
        mode: ``"multiclass"``: ``y_pred`` (N, C, H, W), ``y_true`` (N, H, W) or (N, 1, H, W) of classes.
            ``"binary"``: ``y_pred`` (N, 1, H, W), ``y_true`` (N, H, W) or (N, 1, H, W) of 0 and 1, floating,
            bool or integer; the loss is that of the logits (0, ``y_pred``).
        ignore_index: label to leave out, or None.
        options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`.

    Raises:
        ValueError: another mode. ``"multilabel"`` has no windows of one label.
    """

    def __init__(self, mode: str, ignore_index: int | None = None, **options) -> None:
        super().__init__()
        if mode not in ("binary", "multiclass"):
            raise ValueError(f"RegionLoss: expected mode to be 'binary' or 'multiclass', got {mode!r}")
        self.mode = mode
        self.loss = RegionCrossEntropyLoss(
            ignore_index=-100 if ignore_index is None else ignore_index, **options
        )

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        if self.mode == "binary":
            y_pred = torch.cat([torch.zeros_like(y_pred), y_pred], dim=1)
        if y_true.is_floating_point() or y_true.dtype == torch.bool:
            y_true = y_true.long()  # integers of any width are read as they are
        return self.loss(y_pred, y_true)
