"""The CUDA kernels of the conditional encoder: against the reference, under capture, without a host sync.

``csrc/tests/test_conditional_encoder_layer_cuda_emulated.cpp`` runs the same kernels where there is no GPU.
"""

import pytest
import torch
from helpers import assert_close_to_exact, requires_cuda
from ops.test_conditional_encoder_layer import ACTIVATIONS, cast, draw_inputs

from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
)
from dynplan.reference import conditional_encoder_layer as reference

pytestmark = [pytest.mark.cuda, requires_cuda]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_cuda(hidden, dispatch, weights):
    moved = [EncoderLayerWeights(*(w.cuda() for w in layer)) for layer in weights]
    return hidden.cuda(), type(dispatch)(*(part.cuda() for part in dispatch)), moved


def packed(weights):
    return [pack_encoder_weights(layer) for layer in weights]


def check(lengths, heads, head_width, intermediate, layers, activation, dtype, spare=0, seed=0):
    """``spare`` rows of the capacity belong to no sample and must not be touched."""
    lengths, width = list(lengths), heads * head_width
    hidden, keep, _, weights = draw_inputs([*lengths, spare], width, intermediate, layers, seed, dtype=dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    keep = keep[: len(lengths)]
    dispatch = build_dispatch(keep, offsets, len(hidden))
    hidden, dispatch, weights = on_cuda(hidden, dispatch, weights)
    with torch.no_grad():
        ours = conditional_encoder(hidden, dispatch, None, heads, activation, packed_weights=packed(weights))
        theirs = reference.conditional_encoder(hidden, dispatch, weights, heads, activation)
        exact = reference.conditional_encoder(
            hidden.double(), dispatch, cast(weights, torch.float64), heads, activation
        )
    assert_close_to_exact(ours, theirs, exact)
    untouched = torch.ones(len(hidden), dtype=torch.bool)
    untouched[: sum(lengths)] = ~keep.any(1).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert torch.equal(ours[untouched], hidden[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head_width", [8, 32, 40, 64, 128])
def test_equals_reference(head_width, activation, dtype):
    check([70, 0, 1, 13, 130], 2, head_width, 72, 3, activation, dtype, spare=9, seed=head_width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[0, 0], [1], [64, 64], [65], [512, 3, 257]])
def test_lengths(lengths, dtype):
    check(lengths, 4, 32, 256, 2, "gelu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bert_base_sizes(dtype):
    check([128] * 30 + [37] * 9, 12, 64, 3072, 2, "gelu", dtype, spare=100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_company(dtype):
    """From 1 to 64 samples of 64 rows, the products take every tile they have."""
    hidden, _, _, weights = draw_inputs([64] * 64, 256, 512, 1, 0, dtype=dtype)
    hidden, blob = hidden.cuda(), pack_encoder_weights(EncoderLayerWeights(*(w.cuda() for w in weights[0])))
    offsets = torch.arange(0, 64 * 64 + 1, 64, dtype=torch.int32, device="cuda")

    def run(samples):
        step = build_dispatch(torch.arange(64, device="cuda") < samples, offsets, len(hidden))
        with torch.no_grad():
            return conditional_encoder_layer(hidden, step, None, 4, packed_weights=blob)

    whole = run(64)
    for samples in (47, 33, 24, 10, 1):
        part, rows = run(samples), 64 * samples
        assert torch.equal(part[:rows], whole[:rows]) and torch.equal(part[rows:], hidden[rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_forced_tiles(dtype, monkeypatch):
    inputs = draw_inputs([70, 0, 130], 264, 520, 1, 0, share=1.0, dtype=dtype)
    hidden, dispatch, weights = on_cuda(inputs[0], inputs[2], inputs[3])
    blobs = packed(weights)

    def run():
        with torch.no_grad():
            return conditional_encoder(hidden, dispatch, None, 3, packed_weights=blobs)

    chosen = run()
    for tile in ("32x64", "64x64", "64x128", "128x128", "128x192", "128x256"):
        monkeypatch.setenv("DYNPLAN_CUDA_TILE", tile)
        assert torch.equal(run(), chosen)
    monkeypatch.setenv("DYNPLAN_CUDA_TILE", "256x128")
    with pytest.raises(ValueError, match="expected DYNPLAN_CUDA_TILE to be one of .* got 256x128"):
        run()


def test_one_graph_serves_every_plan():
    hidden, keep, dispatch, weights = draw_inputs([9, 64, 1, 100], 128, 256, 3, 0, dtype=torch.bfloat16)
    hidden, _, weights = on_cuda(hidden, dispatch, weights)
    blobs, capacity = packed(weights), len(hidden)
    still, plan = hidden.clone(), keep.cuda()
    offsets = torch.tensor([0, 9, 73, 74, 174], dtype=torch.int32, device="cuda")

    def run():
        step = build_dispatch(plan, offsets, capacity)
        return conditional_encoder(still, step, None, 4, packed_weights=blobs)

    with torch.no_grad():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        alone, single = torch.zeros(4, 3), torch.zeros(4, 3)
        alone[1], single[:, 2] = 1, 1
        plans = [torch.ones(4, 3), torch.zeros(4, 3), torch.rand(4, 3) < 0.5, alone, single]
        lengths = [[9, 73, 74, 174], [1, 2, 3, 4], [0, 0, 60, 174], [80, 160, 161, 170], [44, 88, 132, 174]]
        for kept, ends in zip(plans, lengths, strict=True):
            plan.copy_(kept.bool())
            offsets[1:] = torch.tensor(ends, dtype=torch.int32)
            still.copy_(torch.randn_like(still))
            graph.replay()
            replayed = result.clone()
            assert torch.equal(replayed, run())


def test_never_waits_for_the_device():
    inputs = draw_inputs([9, 64, 1], 64, 128, 2, 0)
    hidden, dispatch, weights = on_cuda(inputs[0], inputs[2], inputs[3])
    keep = inputs[1].cuda()
    offsets = torch.tensor([0, 9, 73, 74], dtype=torch.int32, device="cuda")
    blobs = packed(weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            dispatch = build_dispatch(keep, offsets, len(hidden))
            conditional_encoder(hidden, dispatch, None, 2, packed_weights=blobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams():
    cases = []
    for seed in range(2):
        hidden, _, dispatch, weights = draw_inputs([200, 30, 77], 256, 512, 4, seed, dtype=torch.bfloat16)
        cases.append(on_cuda(hidden, dispatch, weights))
    with torch.no_grad():
        blobs = [packed(weights) for _, _, weights in cases]
        wanted = [
            conditional_encoder(hidden, dispatch, None, 4, packed_weights=blob)
            for (hidden, dispatch, _), blob in zip(cases, blobs, strict=True)
        ]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in cases]
        got = [[], []]
        for _ in range(20):
            for which, ((hidden, dispatch, _), stream) in enumerate(zip(cases, streams, strict=True)):
                with torch.cuda.stream(stream):
                    got[which].append(
                        conditional_encoder(hidden, dispatch, None, 4, packed_weights=blobs[which])
                    )
        torch.cuda.synchronize()
    for results, one in zip(got, wanted, strict=True):
        assert all(torch.equal(result, one) for result in results)


def test_gradients_equal_those_on_cpu():
    hidden, _, dispatch, weights = draw_inputs([9, 0, 4], 32, 64, 2, 0, dtype=torch.float64)

    def run(hidden, dispatch, weights):
        leaves = [hidden.detach().clone().requires_grad_()]
        leaves += [w.detach().clone().requires_grad_() for layer in weights for w in layer]
        layers = [EncoderLayerWeights(*leaves[1:13]), EncoderLayerWeights(*leaves[13:25])]
        conditional_encoder(leaves[0], dispatch, layers, 4).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, theirs in zip(
        run(*on_cuda(hidden, dispatch, weights)), run(hidden, dispatch, weights), strict=True
    ):
        torch.testing.assert_close(None if ours is None else ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    hidden, _, dispatch, weights = draw_inputs([9, 5, 4], 32, 64, 1, 0, share=1.0)
    hidden, dispatch, weights = on_cuda(hidden, dispatch, weights)
    for w in weights[0]:
        w.requires_grad_()
    exact = conditional_encoder(hidden, dispatch, weights, 4)
    with torch.autocast("cuda", dtype):
        ours = conditional_encoder(hidden, dispatch, weights, 4)
    assert ours.dtype == hidden.dtype
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.1)
    ours.sum().backward()
    assert all(w.grad.isfinite().all() and w.grad.dtype == torch.float32 for w in weights[0])


def test_opcheck():
    hidden, _, dispatch, weights = draw_inputs([9, 0, 4], 32, 64, 2, 0)
    hidden, dispatch, weights = on_cuda(hidden, dispatch, weights)
    torch.library.opcheck(torch.ops.dynplan.pack_encoder_weights.default, (list(weights[0]),))
    torch.library.opcheck(
        torch.ops.dynplan.conditional_encoder.default,
        (hidden, *dispatch, packed(weights), 4, "gelu", 1e-12),
    )


def test_errors():
    hidden, _, dispatch, weights = draw_inputs([9, 4], 32, 64, 1, 0)
    hidden, dispatch, weights = on_cuda(hidden, dispatch, weights)
    layer, blob = dispatch.layer(0), packed(weights)[0]

    def run(hidden=hidden, layer=layer, blob=blob, heads=4):
        with torch.no_grad():
            return conditional_encoder_layer(hidden, layer, None, heads, packed_weights=blob)

    with pytest.raises(
        TypeError, match="expected packed_weights of pack_encoder_weights to be BFloat16, got Float"
    ):
        run(hidden=hidden.bfloat16())
    with pytest.raises(ValueError, match="expected packed_weights on cuda:0, got cpu"):
        run(blob=blob.cpu())
    with pytest.raises(ValueError, match="expected rows on cuda:0, got cpu"):
        run(layer=layer._replace(rows=layer.rows.cpu()))
    with pytest.raises(
        ValueError, match="expected the head dimension on CUDA to be a multiple of 8 and at most 128, got 4"
    ):
        run(heads=8)
    with pytest.raises(
        ValueError, match="expected packed_weights to come from pack_encoder_weights for width 32"
    ):
        run(blob=blob[:-1])
