"""region_cross_entropy_upsampled equals interpolation followed by the loss."""

import pytest
import torch
from helpers import assert_close_to_exact, on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_region_cross_entropy import case, value_and_grad

from dynplan.ops import region_cross_entropy_stats, region_cross_entropy_upsampled
from dynplan.reference import region_cross_entropy as reference


@settings(max_examples=40)
@given(
    low=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    scale=st.sampled_from([1, 2, 3, 4, 8]),
    trim=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    align_corners=st.booleans(),
    merge=st.sampled_from(["logits", "probs"]),
    kernel_size=st.sampled_from([1, 3, 5]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**16),
)
def test_drawn_cases_equal_interpolation_then_loss(
    low, scale, trim, align_corners, merge, kernel_size, smoothing, seed
):
    full = [max(1, n * scale - t) for n, t in zip(low, trim, strict=True)]
    input, target = case(*low, seed=seed, void=0)[0], case(*full, seed=seed + 1, void=1)[1]
    options = {"align_corners": align_corners, "merge": merge, "kernel_size": kernel_size}
    options["label_smoothing"] = smoothing
    value, gradient = value_and_grad(region_cross_entropy_upsampled, input, target, **options)
    exact, exact_gradient = value_and_grad(reference.region_cross_entropy_upsampled, input, target, **options)
    torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_and_strides(dtype, align_corners):
    input, target = case(40, 30, classes=6, dtype=dtype)[0], case(160, 120)[1]
    value, gradient = value_and_grad(
        region_cross_entropy_upsampled, input, target, align_corners=align_corners
    )
    plain = reference.region_cross_entropy_upsampled
    exact, exact_gradient = value_and_grad(plain, input.double(), target, align_corners=align_corners)
    eager, eager_gradient = value_and_grad(plain, input, target, align_corners=align_corners)
    assert_close_to_exact(value, eager.float(), exact, atol=2e-6)
    largest = exact_gradient.abs().max().item()
    assert_close_to_exact(gradient, eager_gradient, exact_gradient, atol=2 * torch.finfo(dtype).eps * largest)
    channels_last = input.to(memory_format=torch.channels_last)
    other = value_and_grad(region_cross_entropy_upsampled, channels_last, target, align_corners=align_corners)
    assert torch.equal(other[0], value) and torch.equal(other[1], gradient)
    assert other[1].stride() == channels_last.stride()


def test_smaller_labels_and_stats():
    input, target = case(20, 20)[0], case(7, 8)[1]
    value, gradient = value_and_grad(region_cross_entropy_upsampled, input, target)
    exact, exact_gradient = value_and_grad(reference.region_cross_entropy_upsampled, input, target)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, exact_gradient)
    stats = region_cross_entropy_stats(input, target, align_corners=False)
    assert torch.equal(stats.loss, value) and stats.losses.shape == target.shape == stats.agreement.shape


def test_full_resolution_logits_never_exist():
    input, target = case(32, 32, classes=16, dtype=torch.float32)[0].requires_grad_(), case(256, 256)[1]
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        region_cross_entropy_upsampled(input, target).backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated <= input.numel() * 4 + 16 * target.numel() + 4096 < target.numel() * 16 * 4


def test_bits_do_not_depend_on_threads():
    input, target = case(48, 30, classes=5, dtype=torch.float32)[0], case(190, 121)[1]
    results = on_threads((1, 2, 3), lambda: value_and_grad(region_cross_entropy_upsampled, input, target))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_errors():
    with pytest.raises(
        ValueError, match=r"^region_cross_entropy_upsampled: expected input to have shape \(N, C, h, w\)"
    ):
        region_cross_entropy_upsampled(torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, 3, 3, 3).long())
    with pytest.raises(ValueError, match="expected target to have shape"):
        region_cross_entropy_upsampled(torch.zeros(1, 2, 3, 3), torch.zeros(2, 6, 6).long())
