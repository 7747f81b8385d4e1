"""What :mod:`dynplan.ops.region_cross_entropy` computes, shifting the image once per window offset."""

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


def _per_axis(value, axes: int) -> list:
    return list(value) if isinstance(value, (tuple, list)) else [value] * axes


def anchor_losses(
    input: Tensor,
    target: Tensor,
    kernel_size=5,
    sigma: float = 1.0,
    stride=1,
    merge: str = "logits",
    normalize: str = "weight",
    weight: Tensor | None = None,
    ignore_index=-100,
    label_smoothing: float = 0.0,
    spacing=1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, validity and number of agreeing pixels of every anchor, each (N, *anchors)."""
    axes, classes = input.dim() - 2, input.shape[1]
    ignored = torch.tensor(_per_axis(ignore_index, 1), device=target.device)
    valid = ~torch.isin(target.long(), ignored)
    labels = torch.where(valid, target.long(), -1)
    radius = [k // 2 for k in _per_axis(kernel_size, axes)]
    spacing = _per_axis(spacing, axes)
    margins = [r for r in reversed(radius) for _ in range(2)]
    values = pad(input if merge == "logits" else input.softmax(1), margins)
    padded_labels = pad(labels, margins, value=-1)

    pooled, total, agreement = 0.0, 0.0, 0
    for offset in itertools.product(*(range(-r, r + 1) for r in radius)):
        distance = max(abs(o) * s for o, s in zip(offset, spacing, strict=True))
        w = math.exp(-0.5 * (distance / sigma) ** 2)
        window = tuple(
            slice(r + o, r + o + n) for r, o, n in zip(radius, offset, target.shape[1:], strict=True)
        )
        agree = (padded_labels[(slice(None), *window)] == labels) & valid
        pooled = pooled + torch.where(agree[:, None], w * values[(slice(None), slice(None), *window)], 0)
        total = total + agree.to(input.dtype) * (w if normalize == "weight" else 1.0)
        agreement = agreement + agree.to(torch.int16)
    pooled = pooled / torch.where(valid, total, 1)[:, None]

    at_anchors = (..., *(slice(None, None, s) for s in _per_axis(stride, axes)))
    pooled, labels, valid = pooled[at_anchors], labels[at_anchors], valid[at_anchors]
    if merge == "logits":
        log_probability = pooled.log_softmax(1)
    else:
        log_probability = pooled.clamp_min(torch.finfo(pooled.dtype).tiny).log()
    if weight is None:
        weight = input.new_ones(classes)
    label = labels.clamp_min(0)
    nll = -weight[label] * log_probability.gather(1, label[:, None])[:, 0]
    smooth = -(weight.view(-1, *[1] * axes) * log_probability).mean(1)
    losses = (1 - label_smoothing) * nll + (label_smoothing * smooth if label_smoothing else 0)
    return torch.where(valid, losses, 0), valid, agreement[at_anchors]


def region_cross_entropy(
    input: Tensor,
    target: Tensor,
    kernel_size=5,
    sigma: float = 1.0,
    stride=1,
    p: float = 5.0,
    merge: str = "logits",
    normalize: str = "weight",
    weight: Tensor | None = None,
    ignore_index=-100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    spacing=1.0,
) -> Tensor:
    losses, valid, _ = anchor_losses(
        input,
        target,
        kernel_size,
        sigma,
        stride,
        merge,
        normalize,
        weight,
        ignore_index,
        label_smoothing,
        spacing,
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if not losses.any():  # also keeps the gradient of x^(1/p) at 0 finite
        return losses.sum()
    anchors = target[(..., *(slice(None, None, s) for s in _per_axis(stride, input.dim() - 2)))]
    weights = torch.ones_like(losses) if weight is None else weight[torch.where(valid, anchors.long(), 0)]
    normalizer = torch.where(valid, weights, 0).pow(p).sum()
    largest = losses.max().detach()
    return largest * ((losses / largest).pow(p).sum() / normalizer).pow(1 / p)


def region_cross_entropy_upsampled(
    input: Tensor, target: Tensor, align_corners: bool = False, **options
) -> Tensor:
    full = interpolate(input, target.shape[1:], mode="bilinear", align_corners=align_corners)
    return region_cross_entropy(full, target, **options)
