import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import INSTRUCTION_SETS, on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_conditional_encoder_layer import ACTIVATIONS, cast, draw_inputs

from dynplan import _native
from dynplan.ops import (
    build_dispatch,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
    pack_reduced_encoder_weights,
)
from dynplan.reference import conditional_encoder_layer as full_precision
from dynplan.reference.reduced_encoder import int8_linear, quantize, reduced_encoder

DTYPES = ["int8", "bfloat16"]
LEVELS = torch.ops.dynplan._int8_weight_levels()
ROUNDS_ROWS = torch.ops.dynplan._multiplies_bfloat16()


def pack(weights, dtype):
    return [pack_reduced_encoder_weights(layer, dtype) for layer in weights]


def test_int8_linear_is_near_the_exact_one():
    x, weight, bias = torch.randn(5, 300), torch.randn(7, 300), torch.randn(7)
    a, scale = quantize(x, 127)
    assert a.abs().amax(1).eq(127).all() and ((a * scale - x).abs() <= scale * 0.5001).all()
    exact = torch.nn.functional.linear(x, weight, bias)
    assert (int8_linear(x, weight, bias) - exact).abs().max() < 0.02 * exact.abs().max()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    heads=st.integers(1, 4),
    head_width=st.sampled_from([2, 3, 8, 16, 20]),
    intermediate=st.integers(2, 70),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    rows_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_equals_reference(lengths, heads, head_width, intermediate, activation, dtype, rows_dtype, seed):
    hidden, keep, dispatch, weights = draw_inputs(lengths, heads * head_width, intermediate, 1, seed)
    hidden = hidden.to(rows_dtype)
    ours = conditional_encoder(hidden, dispatch, None, heads, activation, packed_weights=pack(weights, dtype))
    bypassed = ~keep.any(1).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert ours.dtype == rows_dtype and torch.equal(ours[bypassed], hidden[bypassed])
    theirs = reduced_encoder(
        hidden.float(),
        dispatch,
        weights,
        heads,
        activation,
        dtype=dtype,
        levels=LEVELS,
        rounds_rows=ROUNDS_ROWS,
    )
    # Where a number lies between two steps the last bit of a sum decides, so a few rows may differ by a step.
    error = (ours.float() - theirs).abs().flatten()
    assert error.quantile(0.5) <= (2e-6 if rows_dtype == torch.float32 else 2e-2) if len(error) else True


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.04), ("bfloat16", 0.02)])
@torch.no_grad()
def test_near_full_precision(dtype, share, activation):
    hidden, _, dispatch, weights = draw_inputs([30, 8, 90, 25], 96, 200, 3, 3)
    exact = full_precision.conditional_encoder(
        hidden.double(), dispatch, cast(weights, torch.float64), 6, activation
    )
    ours = conditional_encoder(hidden, dispatch, None, 6, activation, packed_weights=pack(weights, dtype))
    assert (ours - exact).norm() < share * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_no_thread(dtype):
    for lengths in ([5, 40, 1, 33, 64, 20, 90, 81], [20, 17]):  # many rows and few
        hidden, _, dispatch, weights = draw_inputs(lengths, 48, 96, 3, 6)
        run = partial(conditional_encoder, hidden, dispatch, None, 4, packed_weights=pack(weights, dtype))
        results = on_threads((1, 2, 3, 2), run)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_nothing_but_the_sample(dtype):
    lengths = [5, 40, 1, 33, 64, 20, 90]
    hidden, keep, dispatch, weights = draw_inputs(lengths, 48, 96, 3, 6)
    packed = pack(weights, dtype)
    together = conditional_encoder(hidden, dispatch, None, 4, packed_weights=packed)
    begin = 0
    for sample, length in enumerate(lengths):
        alone = build_dispatch(keep[sample : sample + 1], torch.tensor([0, length]).int(), length)
        got = conditional_encoder(hidden[begin : begin + length], alone, None, 4, packed_weights=packed)
        assert torch.equal(got, together[begin : begin + length])
        begin += length


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_stays_in_its_sample(dtype):
    hidden, _, _, weights = draw_inputs([3, 4], 16, 24, 1, 0)
    dispatch = build_dispatch(torch.ones(2, 1).bool(), torch.tensor([0, 3, 7]).int(), 7)
    packed = pack(weights, dtype)
    clean = conditional_encoder(hidden, dispatch, None, 2, packed_weights=packed)
    for value in (float("nan"), float("inf")):
        broken = hidden.clone()
        broken[1, 5] = value
        got = conditional_encoder(broken, dispatch, None, 2, packed_weights=packed)
        assert not got[:3].isfinite().any() and torch.equal(got[3:], clean[3:])
    weights[0].up_weight[3, 2] = float("inf")
    assert (
        not conditional_encoder(hidden, dispatch, None, 2, packed_weights=pack(weights, dtype))
        .isfinite()
        .any()
    )


def test_zero_rows_and_channels():
    hidden, _, _, [weights] = draw_inputs([3], 16, 24, 1, 0)
    dispatch = build_dispatch(torch.ones(1, 1).bool(), torch.tensor([0, 3]).int(), 3)
    weights.qkv_weight.zero_()
    weights.down_weight[2] = 1e-38
    hidden[1] = 0
    got = conditional_encoder(hidden, dispatch, None, 2, packed_weights=pack([weights], "int8"))
    torch.testing.assert_close(
        got,
        reduced_encoder(hidden, dispatch, [weights], 2, dtype="int8", levels=LEVELS),
        rtol=1e-2,
        atol=1e-2,
    )


def test_from_bfloat16_weights():
    hidden, _, dispatch, weights = draw_inputs([3, 9], 16, 24, 2, 0, dtype=torch.bfloat16)
    for dtype in DTYPES:
        narrow = conditional_encoder(hidden, dispatch, None, 2, packed_weights=pack(weights, dtype))
        wide = conditional_encoder(
            hidden, dispatch, None, 2, packed_weights=pack(cast(weights, torch.float32), dtype)
        )
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(lengths, dtype):
    hidden, _, dispatch, weights = draw_inputs(lengths, 8, 20, 2, 2)
    ops = torch.ops.dynplan
    torch.library.opcheck(ops.pack_reduced_encoder_weights.default, (list(weights[0]), dtype))
    packed = pack(weights, dtype)
    torch.library.opcheck(ops.conditional_encoder.default, (hidden, *dispatch, packed, 2, "gelu", 1e-5))


def test_one_layer_at_a_time_is_the_same():
    hidden, _, dispatch, weights = draw_inputs([3, 9, 4], 16, 24, 3, 0)
    packed = pack(weights, "int8")
    step = hidden
    for layer, blob in enumerate(packed):
        step = conditional_encoder_layer(step, dispatch.layer(layer), None, 2, packed_weights=blob)
    assert torch.equal(step, conditional_encoder(hidden, dispatch, None, 2, packed_weights=packed))


def test_weights_errors():
    _, _, _, [weights] = draw_inputs([1], 8, 20, 1, 0)
    name = "pack_reduced_encoder_weights: expected "
    with pytest.raises(ValueError, match=name + "dtype to be int8 or bfloat16, got int4"):
        pack_reduced_encoder_weights(weights, "int4")
    with pytest.raises(ValueError, match=name + r"up_bias to have shape \[20\], got \[8\]"):
        pack_reduced_encoder_weights(weights._replace(up_bias=torch.zeros(8)), "int8")
    _, _, _, [thin] = draw_inputs([1], 8, 1, 1, 0)
    with pytest.raises(ValueError, match=name + "sizes of at least 2 for int8, got H = 8, I = 1"):
        pack_reduced_encoder_weights(thin, "int8")


def test_blobs_that_do_not_belong():
    hidden, _, _, [weights, other] = draw_inputs([2, 1], 8, 4, 2, 0)
    dispatch = build_dispatch(torch.ones(2, 2).bool(), torch.tensor([0, 2, 3]).int(), 3)
    [int8], [bfloat16], full = pack([weights], "int8"), pack([other], "bfloat16"), pack_encoder_weights(other)
    for blobs, text in [
        ([int8, bfloat16], "one feed-forward width and one type, got 4 and 4 of types int8 and bfloat16"),
        ([int8, full], "one feed-forward width and one type, got 4 and 4 of types int8 and float32"),
        ([full, bfloat16], "one feed-forward width and one type, got 4 and 4 of types float32 and bfloat16"),
        ([int8[:-64], int8], rf"to have {len(int8)} bytes, got {len(int8) - 64}"),
        ([int8[64:], int8], "to come from pack_encoder_weights or pack_reduced_encoder_weights"),
    ]:
        with pytest.raises(ValueError, match="conditional_encoder: expected packed_weights (of )?" + text):
            conditional_encoder(hidden, dispatch, None, 2, packed_weights=blobs)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_equals_op(dtype, isa):
    """On every instruction set; bfloat16's rows are rounded by one of them alone."""
    hidden, _, dispatch, weights = draw_inputs([5, 30, 0, 9], 24, 31, 2, 4)
    packed = [_native.pack_encoder_weights([w.numpy() for w in layer], dtype) for layer in weights]
    native = torch.from_numpy(
        _native.conditional_encoder(
            hidden.numpy(), *(x.numpy() for x in dispatch), packed, 3, "gelu", 1e-12, isa
        )
    )
    ours = conditional_encoder(hidden, dispatch, None, 3, packed_weights=pack(weights, dtype))
    assert (native - ours).norm() < 0.02 * ours.norm()
    if dtype == "bfloat16":
        for blob, layer in zip(packed, weights, strict=True):
            assert torch.equal(torch.from_numpy(blob), pack_reduced_encoder_weights(layer, dtype))
    with pytest.raises(ValueError, match="expected dtype to be float32, bfloat16 or int8, got int4"):
        _native.pack_encoder_weights([w.numpy() for w in weights[0]], "int4")


EXTREMES = """
import torch
from dynplan.ops import build_dispatch, conditional_encoder, pack_reduced_encoder_weights
from dynplan.reference.reduced_encoder import reduced_encoder
from ops.test_conditional_encoder_layer import draw_weights

weights = draw_weights(64, 128, torch.Generator().manual_seed(0))
for weight in (weights.qkv_weight, weights.output_weight, weights.up_weight, weights.down_weight):
    weight.sign_()
weights.qkv_weight.fill_(1)
levels = torch.ops.dynplan._int8_weight_levels()
for length in (1, 9, 90):
    dispatch = build_dispatch(torch.ones(1, 1).bool(), torch.tensor([0, length]).int(), length)
    hidden = torch.ones(length, 64)
    ours = conditional_encoder(
        hidden, dispatch, None, 4, "relu", packed_weights=[pack_reduced_encoder_weights(weights, "int8")]
    )
    theirs = reduced_encoder(hidden, dispatch, [weights], 4, "relu", dtype="int8", levels=levels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
print(levels)
"""


@pytest.mark.skipif(_native.cpu_features()["best_isa"] == "baseline", reason="needs a CPU with avx2")
def test_sums_are_exact_without_vnni_too():
    """Rows and weights at their largest, on a oneDNN that adds pairs of products in 16 bits."""
    narrow = {"DYNPLAN_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", EXTREMES],
        env=os.environ | narrow | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (64, 127)
