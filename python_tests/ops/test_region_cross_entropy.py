"""region_cross_entropy against its reference and F.cross_entropy, and at the edges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_but_for_order, on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from dynplan import _native
from dynplan.ops import region_cross_entropy, region_cross_entropy_stats
from dynplan.reference import region_cross_entropy as reference


def case(*space, classes=4, batch=2, dtype=torch.float64, seed=0, labelled=3, void=3):
    """Logits 2 N(0, 1) and labels 0..labelled-1 in blobs, so that windows agree; the first pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    input = 2 * torch.randn(batch, classes, *space, generator=generator, dtype=torch.float64)
    coarse = torch.randint(labelled, (batch, 1, *((n + 2) // 3 for n in space)), generator=generator)
    target = F.interpolate(coarse.double(), space).long()[:, 0]
    noise = torch.rand(target.shape, generator=generator) < 0.2
    target[noise] = torch.randint(labelled, target.shape, generator=generator)[noise]
    target.view(batch, -1)[0, :void] = -100
    return input.to(dtype), target


def value_and_grad(function, input, target, **options):
    input = input.detach().requires_grad_()
    value = function(input, target, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    (gradient,) = torch.autograd.grad(
        value, input, weights
    )  # random-looking upstream gradients, never all ones
    return value.detach(), gradient


def assert_like_reference(input, target, tolerance=1e-12, **options):
    value, gradient = value_and_grad(region_cross_entropy, input, target, **options)
    exact, exact_gradient = value_and_grad(reference.region_cross_entropy, input, target, **options)
    torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, exact_gradient, rtol=tolerance, atol=tolerance)


OPTIONS = {
    "kernel_size": [1, 3, 5, 7, 15],
    "sigma": [0.5, 1.0, 2.5, math.inf],
    "stride": [1, 2, 3],
    "p": [1.0, 2.0, 5.0, 2.7],
    "normalize": ["weight", "count"],
    "reduction": ["mean", "none"],
}


@settings(max_examples=80)
@given(
    options=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OPTIONS.items()}),
    space=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    classes=st.sampled_from([1, 2, 3, 7, 8, 9, 21]),
    smoothing=st.sampled_from([0.0, 0.3]),
    probs=st.booleans(),
    weighted=st.booleans(),
    labelled=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_drawn_cases_equal_the_reference(options, space, classes, smoothing, probs, weighted, labelled, seed):
    input, target = case(*space, classes=classes, seed=seed, labelled=min(labelled, classes), void=2)
    options |= {"merge": "probs" if probs else "logits", "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.linspace(0.5, 2, classes, dtype=torch.float64)
    assert_like_reference(input, target, tolerance=1e-10, **options)


@pytest.mark.parametrize("kernel_size", [(3, 5), (1, 7), (5, 1)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_tuples_per_axis(kernel_size, stride):
    assert_like_reference(*case(11, 37), kernel_size=kernel_size, stride=stride)


@pytest.mark.parametrize("options", [
    {"kernel_size": 3},
    {"kernel_size": 5, "stride": 2, "normalize": "count"},
    {"kernel_size": (1, 3, 5), "spacing": (2.5, 1.0, 0.5)},
    {"kernel_size": 5, "spacing": (3.0, 1.0, 1.0), "sigma": 1.5, "merge": "probs"},
    {"kernel_size": 3, "stride": (2, 1, 3), "label_smoothing": 0.1, "reduction": "none"},
    {"kernel_size": 3, "merge": "probs", "label_smoothing": 0.1, "normalize": "count"},
])  # fmt: skip
def test_volumes(options):
    assert_like_reference(*case(5, 6, 19, seed=1), **options)


def test_numbers_come_from_any_collection():
    input, target = case(11, 12)
    expected = region_cross_entropy(input, target, (3, 5), spacing=(2.0, 1.0), ignore_index=(-100, 2))
    for several in (np.array, torch.tensor):
        ours = region_cross_entropy(
            input, target, several([3, 5]), spacing=several([2.0, 1.0]), ignore_index={2, -100}
        )
        assert torch.equal(ours, expected)
    kernel_size, sigma = np.int64(3), torch.tensor(1.5)
    assert region_cross_entropy(input, target, kernel_size, sigma) == region_cross_entropy(
        input, target, 3, 1.5
    )


def test_spacing_changes_the_weights():
    input, target = case(9, 9)
    assert region_cross_entropy(input, target, spacing=2.0) == region_cross_entropy(input, target, sigma=0.5)
    assert region_cross_entropy(input, target, spacing=(2.0, 1.0)) != region_cross_entropy(input, target)


MERGES = {
    "logits": {},
    "probs": {"merge": "probs"},
    "smoothed probs": {"merge": "probs", "label_smoothing": 0.2},
}
merges = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())


@merges
@pytest.mark.parametrize("space", [(150, 70), (10, 400), (9, 20, 40)])
def test_images_larger_than_one_unit_of_work(space, merge):
    input, target = case(*space, classes=5, batch=1, seed=3)
    assert_like_reference(input, target, kernel_size=5, **merge)


def test_largest_window_over_several_segments_of_work():
    input, target = case(10, 250, classes=3, batch=1)
    assert_like_reference(input, target, kernel_size=15)


# F.cross_entropy is kernel_size=1, p=1.


@pytest.mark.parametrize("merge", ["logits", "probs"])
@pytest.mark.parametrize("normalize", ["weight", "count"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_1_p_1_is_cross_entropy(merge, normalize, smoothing, weighted, reduction, dtype):
    input, target = case(13, 17, dtype=dtype)
    weight = torch.tensor([0.3, 1.0, 2.5, 0.0], dtype=dtype) if weighted else None
    shared = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = value_and_grad(
        region_cross_entropy, input, target, kernel_size=1, p=1.0, merge=merge, normalize=normalize, **shared
    )
    torchs = value_and_grad(F.cross_entropy, input, target, **shared)
    for mine, theirs in zip(ours, torchs, strict=True):
        exact = dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-12 if exact else 2e-6, atol=1e-12 if exact else 1e-6)


@pytest.mark.parametrize("ignore_index", [255, 1, (255, 2)])
def test_ignore_index(ignore_index):
    input, target = case(8, 9, void=0)
    target[0, :2] = 255 if ignore_index != 1 else 1
    assert_like_reference(input, target, ignore_index=ignore_index)
    if isinstance(ignore_index, int):
        ours = value_and_grad(
            region_cross_entropy, input, target.masked_fill(target == 255, ignore_index),
            kernel_size=1, p=1.0, ignore_index=ignore_index,
        )  # fmt: skip
        torchs = value_and_grad(
            F.cross_entropy, input, target.masked_fill(target == 255, ignore_index), ignore_index=ignore_index
        )
        torch.testing.assert_close(ours, torchs)


# Edges.


@merges
@pytest.mark.parametrize("p", [1.0, 5.0])
def test_all_ignored_gives_loss_0_and_gradient_0(merge, p):
    input, target = case(5, 6)
    value, gradient = value_and_grad(region_cross_entropy, input, torch.full_like(target, -100), p=p, **merge)
    assert value == 0 and (gradient == 0).all()


@merges
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0), (1, 1, 4, 4), (2, 3, 1, 1)])
def test_degenerate_shapes(shape, merge):
    input = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    value = region_cross_entropy(input, target, **merge)
    (gradient,) = torch.autograd.grad(value, input)
    assert value.shape == () and gradient.shape == input.shape and gradient.isfinite().all()
    if input.numel() == 0 or shape[1] == 1:
        assert value == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("merge", ["logits", "probs"])
@pytest.mark.parametrize("p", [1.0, 2.7, 5.0])
def test_one_class_has_no_loss(merge, smoothing, p):
    input, target = case(9, 140, classes=1, labelled=1, dtype=torch.float32)
    weight = torch.tensor([0.7])
    for kernel_size in (1, 5):
        options = {"merge": merge, "label_smoothing": smoothing, "p": p, "weight": weight}
        value, gradient = value_and_grad(
            region_cross_entropy, input, target, kernel_size=kernel_size, **options
        )
        assert value == 0 and gradient.abs().max() < 1e-6


def test_window_larger_than_the_image():
    assert_like_reference(*case(3, 4), kernel_size=15)


@merges
def test_gradient_at_ignored_pixels_is_exactly_0(merge):
    input, target = case(9, 30)
    target[1, 4] = -100
    _, gradient = value_and_grad(region_cross_entropy, input, target, **merge)
    assert (gradient.movedim(1, -1)[target == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes(dtype):
    input, target = case(8, 9, void=0)
    target[0, 0] = 100
    expected = value_and_grad(region_cross_entropy, input, target, ignore_index=100)
    ours = value_and_grad(region_cross_entropy, input, target.to(dtype), ignore_index=100)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(region_cross_entropy(input, target[:, None].to(dtype), ignore_index=100), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@merges
def test_any_strides_are_read_in_place_and_kept(dtype, merge):
    input, target = case(10, 37, classes=6, dtype=dtype)
    value, gradient = value_and_grad(region_cross_entropy, input, target, **merge)
    permuted = {
        "channels-last": input.to(memory_format=torch.channels_last),
        "transposed": input.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for strided in permuted.values():
        other_value, other = value_and_grad(region_cross_entropy, strided, target, **merge)
        assert other.stride() == strided.stride()
        assert_same_but_for_order(other_value, value)
        assert_same_but_for_order(other, gradient)
    sliced = torch.zeros(2, 12, 10, 74, dtype=dtype)[:, ::2, :, ::2].copy_(input)
    labels = target.transpose(1, 2).contiguous().transpose(1, 2)
    other_value, other = value_and_grad(region_cross_entropy, sliced, labels, **merge)
    assert_same_but_for_order(other_value, value)
    assert_same_but_for_order(other, gradient)
    expanded = input[:1].expand(3, -1, -1, -1)
    assert region_cross_entropy(expanded, target[:1].expand(3, -1, -1)).isfinite()


def test_input_is_not_modified_and_backward_runs_twice():
    input, target = case(9, 10)
    kept = input.clone()
    input.requires_grad_()
    value = region_cross_entropy(input, target)
    first = torch.autograd.grad(value, input, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, input)[0]) and torch.equal(input, kept)


@merges
def test_every_output_element_is_written(merge):
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        input, target = case(19, 23, classes=5, dtype=torch.float32)
        value, gradient = value_and_grad(region_cross_entropy, input, target, stride=2, **merge)
        stats = region_cross_entropy_stats(input, target, stride=2, **merge)
    finally:
        torch.use_deterministic_algorithms(False)
    assert value.isfinite() and gradient.isfinite().all() and stats.losses.isfinite().all()


@merges
def test_bits_depend_on_neither_run_nor_threads(merge):
    input, target = case(160, 90, classes=7, dtype=torch.float32)
    results = on_threads((1, 2, 1, 3), lambda: value_and_grad(region_cross_entropy, input, target, **merge))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_stats():
    input, target = case(12, 31)
    options = {"kernel_size": 5, "stride": 2}
    stats = region_cross_entropy_stats(input, target, **options)
    losses, valid, agreement = reference.anchor_losses(input, target, **options)
    torch.testing.assert_close(stats.losses, losses)
    assert torch.equal(stats.agreement, agreement) and stats.agreement.dtype == torch.int16
    assert stats.normalizer == valid.sum()
    assert torch.equal(stats.loss, region_cross_entropy(input, target, **options))
    probs = region_cross_entropy_stats(input, target, merge="probs", **options)
    assert torch.equal(probs.agreement, agreement)


def test_loss_and_map_are_differentiable_together():
    input, target = case(8, 9)

    def both(function):
        leaf = input.clone().requires_grad_()
        mean, losses = function(leaf)
        return torch.autograd.grad(2 * mean + (losses * torch.arange(9)).sum(), leaf)[0]

    def ours(x):
        stats = region_cross_entropy_stats(x, target)
        return stats.loss, stats.losses

    def plain(x):
        return (
            reference.region_cross_entropy(x, target),
            reference.region_cross_entropy(x, target, reduction="none"),
        )

    torch.testing.assert_close(both(ours), both(plain))


def test_native_module_runs_the_same_kernels():
    input, target = case(12, 17, dtype=torch.float32)
    value, losses, gradient = _native.region_cross_entropy(
        input.numpy(), target.numpy(), kernel_size=3, p=2.0
    )
    expected = region_cross_entropy_stats(input.requires_grad_(), target, kernel_size=3, p=2.0).loss
    assert value == expected.item()
    assert torch.equal(torch.from_numpy(gradient), torch.autograd.grad(expected, input)[0])
    reference_map = region_cross_entropy(input, target, kernel_size=3, reduction="none")
    assert torch.equal(torch.from_numpy(losses), reference_map)
    with pytest.raises(IndexError, match="got 9"):
        _native.region_cross_entropy(input.detach().numpy(), target.clamp_min(9).numpy())
