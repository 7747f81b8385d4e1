"""The region loss where there are no images, no pixels or no logits to interpolate."""

import itertools

import pytest
import torch
from helpers import DEVICES

from dynplan import _native
from dynplan.ops import region_cross_entropy, region_cross_entropy_stats, region_cross_entropy_upsampled

SHAPES = [
    (0, 3, 4), (2, 3, 0), (0, 3, 0),
    (0, 5, 3, 4), (2, 5, 0, 4), (2, 5, 4, 0), (2, 5, 0, 0), (2, 5, 1, 0),
    (0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0), (2, 2, 0, 0, 0), (1, 2, 1, 0, 5),
]  # fmt: skip
OPTIONS = [
    {"kernel_size": kernel, "merge": merge, "label_smoothing": smoothing}
    for kernel, merge, smoothing in itertools.product((1, 3, 5), ("logits", "probs"), (0.0, 0.1))
] + [{"stride": 2}, {"kernel_size": 5, "normalize": "count"}, {"p": 1.0}, {"p": 1.0, "reduction": "sum"}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_pixels(shape, dtype, device):
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=device)
    for options in OPTIONS:
        input = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        stats = region_cross_entropy_stats(input, target, **options)
        assert stats.loss == 0 and stats.normalizer == 0
        assert stats.losses.numel() == stats.agreement.numel() == 0
        (stats.loss + stats.losses.sum()).backward()
        assert input.grad.shape == input.shape
        input.grad = None
        loss = region_cross_entropy(input, target, **options)  # loss and gradient at once on CPU
        loss.backward()
        assert loss == 0 and input.grad.shape == input.shape
        losses = region_cross_entropy(input, target, **options | {"p": 1.0, "reduction": "none"})
        assert losses.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("low", "full"),
    [((2, 3, 2, 3), (2, 0, 6)), ((2, 3, 2, 3), (2, 4, 0)), ((2, 3, 2, 3), (2, 0, 0)),
     ((0, 3, 2, 3), (0, 4, 6)), ((2, 3, 0, 3), (2, 0, 6)), ((2, 3, 2, 0), (2, 4, 0)),
     ((2, 3, 0, 0), (2, 0, 0))],
    ids=str,
)  # fmt: skip
def test_no_pixels_upsampled(low, full, align_corners, device):
    target = torch.zeros(full, dtype=torch.long, device=device)
    for options in OPTIONS:
        input = torch.randn(low, device=device, requires_grad=True)
        loss = region_cross_entropy_upsampled(input, target, align_corners=align_corners, **options)
        loss.backward()
        assert loss == 0 and torch.equal(input.grad, torch.zeros_like(input))  # logits there may be


def test_native():
    for shape in SHAPES:
        if len(shape) != 4:
            continue
        for kernel_size in (1, 3, 5):
            value, losses, gradient = _native.region_cross_entropy(
                torch.randn(shape).numpy(), torch.zeros(shape[0], *shape[2:]).long().numpy(), kernel_size
            )
            assert value == 0 and losses.size == gradient.size == 0 and gradient.shape == shape


def test_logits_without_classes_or_pixels_are_refused():
    with pytest.raises(ValueError, match="expected input to have at least 1 class, got"):
        region_cross_entropy(torch.randn(1, 0, 2, 2), torch.full((1, 2, 2), -100))
    with pytest.raises(
        ValueError, match="region_cross_entropy_upsampled: expected input to have a pixel, got"
    ):
        region_cross_entropy_upsampled(torch.randn(1, 2, 0, 2), torch.zeros(1, 4, 4).long())


def test_strides_as_large_as_integers_are():
    input, target = torch.randn(1, 3, 4, 5), torch.randint(3, (1, 4, 5))
    losses = region_cross_entropy(input, target, stride=2**63 - 1, reduction="none")
    assert torch.equal(losses, region_cross_entropy(input, target, reduction="none")[:, :1, :1])
