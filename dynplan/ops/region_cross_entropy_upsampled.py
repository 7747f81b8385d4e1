"""Region cross-entropy of logits at a fraction of the labels' resolution, interpolated inside the kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynplan.ops.region_cross_entropy import run


def region_cross_entropy_upsampled(
    input: Tensor,
    target: Tensor,
    kernel_size: int | Sequence[int] = 5,
    sigma: float = 1.0,
    stride: int | Sequence[int] = 1,
    p: float = 5.0,
    merge: str = "logits",
    normalize: str = "weight",
    weight: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    spacing: float | Sequence[float] = 1.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    align_corners: bool = False,
) -> Tensor:
    """:func:`~dynplan.ops.region_cross_entropy` of the bilinear interpolation of ``input`` to the labels'
    size.

    What ``F.interpolate(input, target.shape[1:], mode="bilinear", align_corners=align_corners)`` followed by
    :func:`~dynplan.ops.region_cross_entropy` computes, without full-resolution logits or their gradient ever
    existing: memory is that of ``input`` and its gradient, and 8 bytes per anchor.

    Args:
        input: (N, C, h, w) logits, as in :func:`~dynplan.ops.region_cross_entropy`; meant for 2 to 8 times
            fewer pixels an axis than ``target`` has, right for any size.
        target: (N, H, W) or (N, 1, H, W) labels, integer.
        kernel_size, sigma, stride, p, merge, normalize, weight, ignore_index, label_smoothing: as in
            :func:`~dynplan.ops.region_cross_entropy`, in pixels of ``target``.
        reduction, spacing, process_group: as there.
        align_corners: as in :func:`torch.nn.functional.interpolate`.

    Returns:
        As :func:`~dynplan.ops.region_cross_entropy`; anchors are pixels of ``target``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`~dynplan.ops.region_cross_entropy`.
    """
    return run(
        align_corners, False, process_group, input, target, weight, kernel_size, stride, spacing, sigma, p,
        merge, normalize, ignore_index, label_smoothing, reduction,
    ).loss  # fmt: skip
