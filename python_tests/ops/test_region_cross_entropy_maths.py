"""region_cross_entropy: precision, and what its formulas promise (docs/region-loss.md)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, assert_close_to_exact
from test_region_cross_entropy import case, merges, value_and_grad

from dynplan.ops import region_cross_entropy
from dynplan.reference import region_cross_entropy as reference

# Precision: no worse than twice the eager form in the same dtype.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [
    {},
    {"p": 1.0},
    {"kernel_size": 7, "normalize": "count"},
    {"merge": "probs"},
    {"stride": 2, "label_smoothing": 0.1},
    {"merge": "probs", "label_smoothing": 0.1},
])  # fmt: skip
def test_error_is_at_most_twice_that_of_the_eager_form(dtype, options):
    input, target = case(24, 40, classes=9, dtype=dtype)
    value, gradient = value_and_grad(region_cross_entropy, input, target, **options)
    exact, exact_gradient = value_and_grad(reference.region_cross_entropy, input.double(), target, **options)
    eager, eager_gradient = value_and_grad(reference.region_cross_entropy, input, target, **options)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert_close_to_exact(value, eager.float(), exact, atol=2e-6)
    # The gradient is of order 1 / pixels: its own rounding is the measured term.
    assert_close_to_exact(
        gradient,
        eager_gradient,
        exact_gradient,
        atol=2 * torch.finfo(dtype).eps * exact_gradient.abs().max().item(),
    )


@merges
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "kernel_size": 1}])  # also apart
@pytest.mark.parametrize("common", [30.0, 1000.0])
def test_what_all_classes_share_costs_no_more_digits_than_eagerly(merge, options, common):
    input, target = case(24, 40, classes=9, dtype=torch.float32)
    input, options = input + common, merge | options
    value, gradient = value_and_grad(region_cross_entropy, input, target, **options)
    exact, exact_gradient = value_and_grad(reference.region_cross_entropy, input.double(), target, **options)
    eager, eager_gradient = value_and_grad(reference.region_cross_entropy, input, target, **options)
    assert_close_to_exact(value, eager, exact, atol=2e-6)
    assert_close_to_exact(gradient, eager_gradient, exact_gradient, atol=2e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_survive_the_trip(dtype):
    # Every finite number of the type, through load and store: K = 1 and p = 1 on two classes.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    input = torch.stack([bits, torch.zeros_like(bits)], 0)[None]
    input = input[:, :, bits.isfinite() & (bits.abs() < 80)]
    target = torch.ones(input[:, 0].shape, dtype=torch.long)
    options = {"kernel_size": 1, "p": 1.0, "reduction": "none"}
    value, gradient = value_and_grad(region_cross_entropy, input, target, **options)
    exact, exact_gradient = value_and_grad(region_cross_entropy, input.double(), target, **options)
    torch.testing.assert_close(value, exact.float(), rtol=1e-6, atol=1e-37)
    rounded = exact_gradient.to(dtype)
    assert (gradient.double() - rounded.double()).abs().max() <= torch.finfo(dtype).eps
    tiny = rounded[:, 0].abs() < torch.finfo(dtype).tiny  # subnormal gradients are kept, not flushed
    torch.testing.assert_close(
        gradient[:, 0][tiny], rounded[:, 0][tiny], rtol=0.01, atol=torch.finfo(dtype).smallest_normal / 100
    )


def test_small_losses_keep_their_digits():
    logits = torch.tensor([[12.0, 0.0, 0.0]]).view(1, 3, 1, 1).expand(1, 3, 8, 8).contiguous()
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    exact = math.log1p(2 * math.exp(-12))
    assert region_cross_entropy(logits, target).item() == pytest.approx(
        exact, rel=1e-5
    )  # lse - z_y would be 3 % off


def test_tiny_and_perfect_losses_at_p_5():
    input = torch.tensor([23.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 6).contiguous().requires_grad_()
    target = torch.zeros(1, 6, 6, dtype=torch.long)
    value = region_cross_entropy(input, target, p=5.0)
    assert value.item() == pytest.approx(math.log1p(math.exp(-23.0)), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, input)
    assert gradient.isfinite().all() and gradient.abs().max() > 0

    perfect = torch.tensor([500.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 6).contiguous()
    for merge in ("logits", "probs"):
        value, gradient = value_and_grad(region_cross_entropy, perfect, target, p=5.0, merge=merge)
        assert value == 0 and (gradient == 0).all()
        # The least that smoothing leaves: of the other class, up to the floor of merged probabilities.
        smoothed, gradient = value_and_grad(
            region_cross_entropy, perfect, target, p=5.0, merge=merge, label_smoothing=0.1
        )
        floor = 500 if merge == "logits" else -math.log(torch.finfo(torch.float32).tiny)
        assert smoothed.item() == pytest.approx(0.05 * floor) and gradient.isfinite().all()
        torch.testing.assert_close(gradient.sum((0, 2, 3)), torch.tensor([0.025, -0.025]))


def test_hopeless_pixels_stay_finite():
    input = torch.tensor([-500.0, 500.0]).view(1, 2, 1, 1).expand(1, 2, 6, 6).contiguous()
    target = torch.zeros(1, 6, 6, dtype=torch.long)
    value, gradient = value_and_grad(region_cross_entropy, input, target)
    assert value.item() == pytest.approx(1000) and torch.allclose(
        gradient.sum((0, 2, 3)).abs(), torch.tensor([0.5, 0.5])
    )
    for smoothing in (0.0, 0.2):
        leaf = input.clone().requires_grad_()
        options = {"merge": "probs", "label_smoothing": smoothing, "p": 1.0, "reduction": "sum"}
        value = region_cross_entropy(leaf, target, **options)
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(2.0**16 * value, leaf)  # of a loss scale
        wanted = 2.0**16 * 36 * (1 - smoothing / 2)
        torch.testing.assert_close(gradient.sum((0, 2, 3)), torch.tensor([-wanted, wanted]))


def test_a_masked_class_does_not_reach_other_labels():
    input, target = case(9, 12, dtype=torch.float32, void=0)
    target = target.clamp_max(1)
    input[:, 3] = -math.inf  # never a label
    without = value_and_grad(region_cross_entropy, input[:, :3], target)
    value, gradient = value_and_grad(region_cross_entropy, input, target)
    torch.testing.assert_close(value, without[0])
    torch.testing.assert_close(gradient[:, :3], without[1])
    assert (gradient[:, 3].abs() < 1e-30).all()


def test_nan_is_not_hidden():
    input, target = case(6, 6, dtype=torch.float32, void=0)
    input[0, 1, 3, 3] = math.nan
    for merge in ("logits", "probs"):
        assert region_cross_entropy(input, target, merge=merge).isnan()


@merges
@pytest.mark.parametrize(("kernel_size", "classes"), [(3, 150), (5, 150), (9, 30)])
def test_nan_reaches_no_further_than_its_windows(kernel_size, classes, merge):
    # Wide enough for several tiles of columns; a tile's memory is used again, by the next image too.
    input, target = case(20, 200, classes=classes, dtype=torch.float32, void=0)
    input, target = input[:1].repeat(3, 1, 1, 1), target[:1].repeat(3, 1, 1)
    clean = input.clone()
    for row, column in ((0, 0), (0, 199), (19, 0), (19, 199), (10, 100)):
        input[0, 1, row, column] = math.nan
    options = {"kernel_size": kernel_size, "reduction": "none", **merge}
    losses, gradient = value_and_grad(region_cross_entropy, input, target, **options)
    expected, expected_gradient = value_and_grad(region_cross_entropy, clean, target, **options)
    near = F.max_pool2d(input[:, 1:2].isnan().float(), kernel_size, 1, kernel_size // 2)
    far = F.max_pool2d(near, kernel_size, 1, kernel_size // 2).expand_as(gradient) == 0
    near = near[:, 0] > 0
    assert losses.isnan().any() and torch.equal(losses[~near], expected[~near])
    assert torch.equal(gradient[far], expected_gradient[far])


@merges
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("kernel_size", [3, 5, (3, 7), 9])
@pytest.mark.parametrize("classes", [4, 30])
def test_logits_of_ignored_pixels_reach_nothing(garbage, kernel_size, classes, merge):
    input, target = case(20, 45, classes=classes, dtype=torch.float32)
    assert (target == -100).any()
    void = (target == -100)[:, None].expand_as(input)
    options = {"kernel_size": kernel_size, **merge}
    clean = value_and_grad(region_cross_entropy, input.masked_fill(void, 0), target, **options)
    value, gradient = value_and_grad(
        region_cross_entropy, input.masked_fill(void, garbage), target, **options
    )
    assert torch.equal(value, clean[0]) and torch.equal(gradient, clean[1])


# Properties of the formulas.


@merges
def test_sum_over_classes_of_the_gradient_is_0(merge):
    _, gradient = value_and_grad(region_cross_entropy, *case(9, 20), **merge)
    assert gradient.sum(1).abs().max() < 1e-16


@pytest.mark.parametrize("normalize", ["weight", "count"])
def test_a_constant_on_all_classes_of_a_pixel_changes_nothing(normalize):
    input, target = case(9, 20)
    shift = torch.randn(2, 1, 9, 20, dtype=torch.float64)
    torch.testing.assert_close(
        region_cross_entropy(input + shift, target, normalize=normalize),
        region_cross_entropy(input, target, normalize=normalize),
    )


def test_spatially_constant_logits_tell_the_normalisers_apart():
    input = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64).view(1, 4, 1, 1).expand(1, 4, 9, 9)
    target = case(9, 9, batch=1)[1]
    plain = F.cross_entropy(input, target)
    torch.testing.assert_close(region_cross_entropy(input, target, p=1.0), plain)
    one = torch.full_like(target, 2)
    for p in (1.0, 2.0, 5.0):
        torch.testing.assert_close(region_cross_entropy(input, one, p=p), F.cross_entropy(input, one))
    counted = region_cross_entropy(input, target, p=1.0, normalize="count")
    assert (counted - plain).abs() > 1e-2


def test_mean_grows_with_p_up_to_the_largest_loss():
    input, target = case(12, 13)
    losses = region_cross_entropy(input, target, reduction="none")
    means = [region_cross_entropy(input, target, p=p) for p in (1.0, 1.5, 2.0, 5.0, 20.0, 100.0)]
    assert all(a <= b for a, b in itertools.pairwise(means)) and means[-1] <= losses.max()
    leaf = losses.detach().requires_grad_()
    count = (target != -100).sum()
    (weights,) = torch.autograd.grad((leaf.pow(5).sum() / count) ** 0.2, leaf)
    assert weights.max() <= count ** (-1 / 5)


@pytest.mark.parametrize(
    ("sigma", "sums"),
    [(0.5, (2.083, 2.088, 2.088)), (1.0, (5.852, 8.018, 8.284)), (2.0, (8.060, 17.764, 25.556))],
)
def test_sum_of_weights(sigma, sums):
    # With the count as normaliser a window of one class shrinks logits by sum / K^2.
    for kernel_size, expected in zip((3, 5, 7), sums, strict=True):
        logit = 3.0
        input = torch.tensor([logit, 0.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 15, 15)
        losses = region_cross_entropy(
            input,
            torch.zeros(1, 15, 15, dtype=torch.long),
            kernel_size,
            sigma,
            normalize="count",
            reduction="none",
        )
        merged = -math.log(math.expm1(losses[0, 7, 7].item()))
        assert merged / logit * kernel_size**2 == pytest.approx(expected, abs=6e-4)


def test_order_of_the_batch_does_not_matter():
    input, target = case(9, 20, batch=4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        region_cross_entropy(input[order], target[order]), region_cross_entropy(input, target)
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("options", [{}, {"normalize": "count"}, {"stride": 2}, {"merge": "probs"}])
def test_gradient_equals_central_differences(p, options):
    input, target = case(7, 8, batch=1)
    _, gradient = value_and_grad(region_cross_entropy, input, target, p=p, **options)
    gradient = gradient / 0.5  # value_and_grad's upstream gradient of a scalar
    step = 1e-6
    for index in torch.randperm(input.numel(), generator=torch.Generator().manual_seed(0))[:40]:
        moved = input.clone().view(-1)
        moved[index] += step
        up = region_cross_entropy(moved.view_as(input), target, p=p, **options)
        moved[index] -= 2 * step
        down = region_cross_entropy(moved.view_as(input), target, p=p, **options)
        assert abs((up - down).item() / (2 * step) - gradient.view(-1)[index].item()) < 1e-8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["weight", "count"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_merged_probabilities_have_the_floor_of_single_ones(normalize, smoothing, dtype, device):
    """Divided by a count, a merged probability may be less than any of those in it."""
    input = (
        torch.tensor([1e4, 0.0], dtype=dtype, device=device)
        .view(1, 2, 1, 1)
        .repeat(1, 1, 6, 7)
        .requires_grad_()
    )
    target = torch.ones(1, 6, 7, dtype=torch.long, device=device)
    options = {
        "kernel_size": 5, "sigma": 0.3, "merge": "probs", "normalize": normalize, "label_smoothing": smoothing
    }  # fmt: skip
    loss = region_cross_entropy(input, target, **options)
    torch.testing.assert_close(
        loss, reference.region_cross_entropy(input, target, **options), rtol=1e-6, atol=0
    )
    loss.backward()  # goes on below the floor, as cross-entropy's
    each = (1 - smoothing / 2) / target.numel()
    torch.testing.assert_close(
        input.grad.sum((2, 3)), torch.tensor([[each, -each]], dtype=dtype, device=device) * 42
    )
