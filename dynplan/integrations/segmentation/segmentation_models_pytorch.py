"""The region loss in the conventions of segmentation_models.pytorch, which is not needed to use it."""

from typing import Any

import torch
from torch import Tensor, nn

from dynplan.nn.labels import check_tensor, held_loss, whole_labels


class RegionLoss(nn.Module):
    """Called as the library's own losses are: ``RegionLoss(mode)(y_pred, y_true)``.

    Args:
        mode: ``"multiclass"``: ``y_pred`` (N, C, H, W), ``y_true`` (N, H, W) or (N, 1, H, W) of classes.
            ``"binary"``: ``y_pred`` (N, 1, H, W), ``y_true`` (N, H, W) or (N, 1, H, W) of 0 and 1; the loss
            is that of the logits (0, ``y_pred``). Labels may be floating, bool or integer, but not soft.
        ignore_index: label to leave out, or None.
        **options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`.

    Raises:
        TypeError: an option that :class:`dynplan.nn.RegionCrossEntropyLoss` does not have (logits are
            expected, so there is no ``from_logits``); on call, what is not a tensor.
        ValueError: another mode: ``"multilabel"`` has no windows of one label. On call, shapes that do not
            fit; soft labels, on CUDA as a device-side assertion.
    """

    def __init__(self, mode: str, ignore_index: int | None = None, **options: Any) -> None:
        super().__init__()
        if mode not in ("binary", "multiclass"):
            raise ValueError(f"RegionLoss: expected mode to be 'binary' or 'multiclass', got {mode!r}")
        self.mode = mode
        self.loss = held_loss({"ignore_index": -100 if ignore_index is None else ignore_index, **options})

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        check_tensor("y_pred", y_pred)
        y_true = whole_labels("y_true", y_true)
        if self.mode == "binary":
            if y_pred.dim() < 3 or y_pred.shape[1] != 1:
                raise ValueError(
                    "RegionLoss: expected y_pred to have shape (N, 1, H, W) with mode 'binary', "
                    f"got {list(y_pred.shape)}"
                )
            y_pred = torch.cat([torch.zeros_like(y_pred), y_pred], dim=1)
        return self.loss(y_pred, y_true)
