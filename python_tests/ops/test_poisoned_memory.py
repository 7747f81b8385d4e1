"""No op reads what it has not written: the same bits whether new memory holds NaN or what was there."""

from contextlib import contextmanager

import pytest
import torch
from helpers import DEVICES
from ops.test_conditional_encoder_layer import draw_inputs
from ops.test_region_cross_entropy import case

from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    pack,
    pack_encoder_weights,
    region_cross_entropy_stats,
    unpack,
)
from dynplan.ops.region_cross_entropy_upsampled import region_cross_entropy_upsampled

REGIONS = [
    {"kernel_size": 3},
    {"kernel_size": 5, "label_smoothing": 0.1},
    {"kernel_size": 7, "normalize": "count"},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": 5, "merge": "probs"},
]


@contextmanager
def poisoned_memory():
    # Only warns where an operation of PyTorch's own has no deterministic form; ours fill what they allocate.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not torch.empty(5).isfinite().any()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_unmoved(run):
    plain = run()
    with poisoned_memory():
        poisoned = run()
    for ours, wanted in zip(poisoned, plain, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_dispatch(device):
    hidden = torch.randn(6, 33, 16, device=device, requires_grad=True)
    mask = (torch.rand(6, 33) < 0.5).to(device)
    keep = (torch.rand(6, 12) < 0.5).to(device)

    def run():
        packed = pack(hidden, mask)
        back = unpack(packed.hidden, packed.indices, 6, 33)
        (gradient,) = torch.autograd.grad(back.square().sum(), hidden)
        return *packed, *build_dispatch(keep, packed.cu_seqlens, len(packed.hidden)), back, gradient

    assert_unmoved(run)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditional_encoder(device, dtype):
    lengths = [70, 0, 1, 13, 130]
    hidden, keep, _, weights = draw_inputs(lengths, 64, 72, 3, 0, dtype=dtype)
    spare = torch.zeros(50, 64, dtype=dtype)  # rows of no sample
    hidden, keep = torch.cat((hidden, spare)).to(device), keep.to(device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    layers = [EncoderLayerWeights(*(w.to(device) for w in layer)) for layer in weights]

    @torch.no_grad()
    def run():
        dispatch = build_dispatch(keep, offsets, len(hidden))
        blobs = [pack_encoder_weights(layer) for layer in layers]
        return [conditional_encoder(hidden, dispatch, None, 4, packed_weights=blobs)]

    assert_unmoved(run)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", REGIONS, ids=str)
def test_region_cross_entropy(device, options):
    input, target = case(37, 71, dtype=torch.float32)
    input, target = input.to(device).requires_grad_(), target.to(device)

    def run():
        stats = region_cross_entropy_stats(input, target, **options)
        return *stats, *torch.autograd.grad(stats.loss, input)

    assert_unmoved(run)


@pytest.mark.parametrize("device", DEVICES)
def test_region_cross_entropy_upsampled(device):
    input, _ = case(5, 6, dtype=torch.float32)
    _, target = case(20, 25)
    input, target = input.to(device).requires_grad_(), target.to(device)

    def run():
        loss = region_cross_entropy_upsampled(input, target)
        return loss.detach(), *torch.autograd.grad(loss, input)

    assert_unmoved(run)
