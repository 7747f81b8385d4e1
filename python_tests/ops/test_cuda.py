"""pack, build_dispatch and region_cross_entropy on CUDA: against the CPU, under capture, without a host sync.

``csrc/tests/test_*_cuda_emulated.cpp`` runs the same kernels where there is no GPU.
"""

import pytest
import torch
from helpers import requires_cuda
from ops.test_region_cross_entropy import case

from dynplan.ops import build_dispatch, pack, region_cross_entropy, region_cross_entropy_stats, unpack
from dynplan.ops.region_cross_entropy_upsampled import region_cross_entropy_upsampled

pytestmark = [pytest.mark.cuda, requires_cuda]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 5, "p": 1.0, "reduction": "none"},
    {"kernel_size": 7, "label_smoothing": 0.1, "normalize": "count"},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": (3, 9), "sigma": 2.0},
    {"kernel_size": 5, "merge": "probs"},
    {"kernel_size": 5, "merge": "probs", "label_smoothing": 0.1, "stride": 2},
]


def value_and_grad(function, input, target, **options):
    input = input.detach().requires_grad_()
    value = function(input, target, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    (gradient,) = torch.autograd.grad(value, input, upstream.view(value.shape))
    return value.detach(), gradient


def assert_like_cpu(function, input, target, **options):
    """The CPU gets the same logits in fp64, so that its own rounding is no part of the comparison."""
    value, gradient = value_and_grad(function, input.cuda(), target.cuda(), **options)
    exact, exact_gradient = value_and_grad(function, input.double(), target, **options)
    acc = max(TOLERANCE[torch.float64 if input.dtype == torch.float64 else torch.float32], 1e-11)
    torch.testing.assert_close(value.cpu().double(), exact, rtol=acc, atol=acc)
    error = (gradient.cpu().double() - exact_gradient).abs().max()
    assert error <= TOLERANCE[input.dtype] * exact_gradient.abs().max() + 1e-30


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("width", [70, 71])
def test_region_equals_the_cpu(width, options, dtype):
    input, target = case(37, width, dtype=dtype)
    assert_like_cpu(region_cross_entropy, input, target, **options)
    assert_like_cpu(region_cross_entropy, input.to(memory_format=torch.channels_last), target, **options)


def test_region_in_three_dimensions():
    assert_like_cpu(region_cross_entropy, *case(6, 9, 11, dtype=torch.float32), kernel_size=3)


@pytest.mark.parametrize("align_corners", [False, True])
def test_region_upsampled(align_corners):
    input, _ = case(5, 6, dtype=torch.float32)
    _, target = case(20, 25)
    assert_like_cpu(region_cross_entropy_upsampled, input, target, align_corners=align_corners)


def test_region_repeats_its_bits():
    input, target = case(64, 100, dtype=torch.float32)
    first = value_and_grad(region_cross_entropy, input.cuda(), target.cuda())
    for _ in range(3):
        again = value_and_grad(region_cross_entropy, input.cuda(), target.cuda())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_region_with_nothing_valid():
    input = torch.randn(1, 3, 20, 20, device="cuda", requires_grad=True)
    stats = region_cross_entropy_stats(input, torch.full((1, 20, 20), -100, device="cuda"))
    stats.loss.backward()
    assert stats.loss == 0 and (input.grad == 0).all() and (stats.agreement == 0).all()


def test_region_in_one_graph_without_a_host_sync():
    input, target = case(37, 70, dtype=torch.float32)
    logits, labels = input.cuda().requires_grad_(), target.cuda()

    def step():
        logits.grad = None
        loss = region_cross_entropy(logits, labels)
        loss.backward()
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = logits.grad
    for seed in range(3):
        fresh, fresh_target = case(37, 70, dtype=torch.float32, seed=seed)
        with torch.no_grad():
            logits.copy_(fresh)
        labels.copy_(fresh_target)
        graph.replay()
        value, gradient = value_and_grad(region_cross_entropy, fresh.cuda(), fresh_target.cuda())
        assert torch.equal(loss, value)
        # value_and_grad's upstream gradient of one value is 0.5
        torch.testing.assert_close(captured, gradient / 0.5, rtol=1e-6, atol=0)


def test_dispatch_in_one_graph_without_a_host_sync():
    hidden = torch.randn(6, 33, 16, device="cuda")
    mask = torch.zeros(6, 33, dtype=torch.int64, device="cuda")
    keep = torch.zeros(6, 12, dtype=torch.bool, device="cuda")

    def step():
        packed = pack(hidden, mask)
        dispatch = build_dispatch(keep, packed.cu_seqlens, 6 * 33)
        return packed, dispatch, unpack(packed.hidden, packed.indices, 6, 33)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, dispatch, back = step()
    for share in (0.0, 0.3, 0.7, 1.0):
        mask.copy_(torch.rand(6, 33) < share)
        keep.copy_(torch.rand(6, 12) < share)
        graph.replay()
        tokens = int(mask.sum())
        wanted = pack(hidden.cpu(), mask.cpu())
        assert torch.equal(packed.cu_seqlens.cpu(), wanted.cu_seqlens)
        assert torch.equal(packed.indices[:tokens].cpu(), wanted.indices)
        assert (packed.indices[tokens:] == -1).all() and (packed.hidden[tokens:] == 0).all()
        assert torch.equal(back, hidden * mask[..., None])
        for ours, theirs in zip(dispatch, build_dispatch(keep.cpu(), wanted.cu_seqlens, 6 * 33), strict=True):
            assert torch.equal(ours.cpu(), theirs)
