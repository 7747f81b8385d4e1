"""The region loss in the conventions of MONAI, which is not needed to use it."""

from torch import Tensor, nn

from dynplan.nn import RegionCrossEntropyLoss

# Any label no data set uses; it is only ever put in place of class 0.
_BACKGROUND = -101


class RegionLoss(nn.Module):
    """Called as MONAI's losses are, on images and volumes: ``RegionLoss()(input, target)``.

    Args:
        include_background: False leaves the pixels of class 0 out, as anchors and in windows.
        ignore_index: label to leave out.
        options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`; ``spacing`` is the voxel size.

    Shape:
        input (N, C, *spatial) logits; target (N, 1, *spatial) or (N, *spatial) labels, floating as MONAI's
        transforms leave them or integer, or one-hot (N, C, *spatial) with C > 1.
    """

    def __init__(self, include_background: bool = True, ignore_index: int = -100, **options) -> None:
        super().__init__()
        self.include_background = include_background
        self.loss = RegionCrossEntropyLoss(ignore_index=(ignore_index, _BACKGROUND), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if target.dim() == input.dim():
            target = target.argmax(1) if target.shape[1] > 1 else target.squeeze(1)
        target = target.long()
        if not self.include_background:
            target = target.masked_fill(target == 0, _BACKGROUND)
        return self.loss(input, target)
