"""Images that are cut into several boxes, with labels of every kind."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_exact, on_threads
from torch import Tensor

from dynplan.ops import region_cross_entropy, region_cross_entropy_stats
from dynplan.reference import region_cross_entropy as reference

SHAPE = (2, 21, 121, 203)


def labels(kind: str) -> Tensor:
    """(N, H, W): one label, ``patches`` of some 15 pixels, ``stripes`` of one pixel, ``grains`` of a few
    labels on one, or ``noise``; a tenth of ``mixed`` is ignored."""
    batch, classes, height, width = SHAPE
    if kind == "one":
        return torch.full((batch, height, width), 3)
    noise = torch.randint(classes, (batch, height, width))
    if kind == "noise":
        return noise
    if kind == "stripes":
        return (torch.arange(height)[:, None] % 7 + torch.arange(width) // 50).expand(batch, -1, -1).clone()
    if kind == "grains":
        return torch.where(torch.rand(noise.shape) < 0.2, noise % 6, 3).masked_fill_(noise == 20, -100)
    coarse = torch.randn(batch, classes, height // 15, width // 15)
    patches = F.interpolate(coarse, (height, width), mode="bilinear").argmax(1)
    if kind == "patches":
        return patches
    patches[:, :40, :90] = noise[:, :40, :90]
    patches[:, 60:] = torch.where(torch.rand(patches[:, 60:].shape) < 0.1, -100, patches[:, 60:])
    return patches


def value_and_gradient(function, input: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = input.detach().requires_grad_()
    loss = function(x, target, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 15])
@pytest.mark.parametrize("kind", ["one", "patches", "stripes", "grains", "noise", "mixed"])
def test_equals_the_reference(kind, kernel_size):
    torch.manual_seed(0)
    input, target = 2 * torch.randn(SHAPE), labels(kind)
    value, gradient = value_and_gradient(region_cross_entropy, input, target, kernel_size=kernel_size)
    eager = value_and_gradient(reference.region_cross_entropy, input, target, kernel_size=kernel_size)
    exact = value_and_gradient(
        reference.region_cross_entropy, input.double(), target, kernel_size=kernel_size
    )
    assert_close_to_exact(value, eager[0], exact[0])
    assert_close_to_exact(
        gradient / exact[1].abs().max(), *(g / exact[1].abs().max() for g in (eager[1], exact[1]))
    )


@pytest.mark.parametrize("options", [
    {"kernel_size": 9, "normalize": "count", "p": 2.5},
    {"kernel_size": (9, 5), "spacing": (0.5, 1.0), "ignore_index": (3, -100)},
    {"kernel_size": (9, 1)},
    {"kernel_size": (1, 11), "sigma": math.inf},
    {"kernel_size": 9, "label_smoothing": 0.1, "weight": torch.linspace(0.5, 2, SHAPE[1])},
    {"kernel_size": 9, "weight": torch.linspace(0.5, 2, SHAPE[1]), "reduction": "sum", "p": 1.0},
])  # fmt: skip
def test_options_on_scattered_labels(options):
    torch.manual_seed(0)
    input, target = 2 * torch.randn(SHAPE), labels("mixed")
    value, gradient = value_and_gradient(region_cross_entropy, input, target, **options)
    weight = {"weight": options["weight"].double()} if "weight" in options else {}
    exact = value_and_gradient(reference.region_cross_entropy, input.double(), target, **options | weight)
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-6, atol=0)
    largest = exact[1].abs().max()
    torch.testing.assert_close(gradient / largest, (exact[1] / largest).float(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9])
@pytest.mark.parametrize("kind", ["patches", "mixed", "noise"])
def test_same_bits_on_any_threads_and_without_a_gradient(kind, kernel_size):
    torch.manual_seed(0)
    input, target = torch.randn(SHAPE), labels(kind)
    results = on_threads(
        (1, 2, 3), lambda: value_and_gradient(region_cross_entropy, input, target, kernel_size=kernel_size)
    )
    with torch.no_grad():
        plain = region_cross_entropy(input, target, kernel_size=kernel_size)
    for value, gradient in results:
        assert torch.equal(value, plain) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, (3, 5)])
@pytest.mark.parametrize("shape", [(2, 2, 90, 121), (2, 150, 90, 121)])
def test_every_loss_has_the_same_bits_without_a_gradient(shape, kernel_size, layout):
    """Boxes and strips of both passes meet windows of one label and of several at other rows."""
    torch.manual_seed(0)
    input = torch.randn(shape).contiguous(memory_format=layout)
    rows, columns = torch.arange(shape[2]) // 25, torch.arange(shape[3]) // 60
    target = ((rows[:, None] + columns) % shape[1]).expand(shape[0], -1, -1).contiguous()
    kernel = list(kernel_size) if isinstance(kernel_size, tuple) else [kernel_size] * 2
    options = (kernel, [1, 1], [1.0, 1.0], 1.0, 5.0, "logits", "weight", [-100], 0.0, "mean")
    expected = torch.ops.dynplan.region_cross_entropy(input, target, None, None, *options, False)[2]
    losses = torch.ops.dynplan._region_cross_entropy_loss_and_gradient(input, target, None, *options)[2]
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
def test_dtypes_and_layouts_equal_float32(dtype, layout, kernel_size):
    torch.manual_seed(0)
    input, target = torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout), labels("mixed")
    value, gradient = value_and_gradient(region_cross_entropy, input, target, kernel_size=kernel_size)
    assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=layout)
    expected, expected_gradient = value_and_gradient(
        region_cross_entropy, input.float().contiguous(), target, kernel_size=kernel_size
    )
    torch.testing.assert_close(value.float(), expected, rtol=1e-5, atol=0)
    largest = expected_gradient.abs().max()
    tolerance = max(torch.finfo(dtype).eps, 1e-5) * largest
    assert (gradient.float() - expected_gradient).abs().max() <= tolerance


@pytest.mark.parametrize("kernel_size", [5, 9])
def test_agreement_counts_the_pixels_of_the_label(kernel_size):
    torch.manual_seed(0)
    input, target = torch.randn(SHAPE), labels("mixed")
    stats = region_cross_entropy_stats(input, target, kernel_size=kernel_size)
    padded = F.pad(target, [kernel_size // 2] * 4, value=-1)
    windows = padded.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1)
    expected = (windows == target[..., None, None]).sum((-2, -1)) * (target >= 0)
    assert torch.equal(stats.agreement.long(), expected)


@pytest.mark.parametrize("kind", ["patches", "noise"])
@pytest.mark.parametrize("kernel_size", [5, 7, 9])
@pytest.mark.parametrize("sigma", [1.0, math.inf])
def test_a_masked_class_weighs_nothing(kind, kernel_size, sigma):
    torch.manual_seed(0)
    input, target = torch.randn(SHAPE), labels(kind).clamp_max(SHAPE[1] - 2)
    input[:, -1] = -math.inf  # never a label
    options = {"kernel_size": kernel_size, "sigma": sigma}
    value, gradient = value_and_gradient(region_cross_entropy, input, target, **options)
    without = value_and_gradient(region_cross_entropy, input[:, :-1], target, **options)
    torch.testing.assert_close(value, without[0])
    torch.testing.assert_close(gradient[:, :-1], without[1])
    assert (gradient[:, -1] == 0).all()
