from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION_SETS, assert_close_to_exact, on_threads
from hypothesis import given
from hypothesis import strategies as st

from dynplan import _native
from dynplan.ops import (
    Dispatch,
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
)
from dynplan.reference import conditional_encoder_layer as reference

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]


def draw_weights(width, intermediate, generator, dtype=torch.float32):
    shapes = {
        "qkv_weight": (3 * width, width),
        "qkv_bias": (3 * width,),
        "output_weight": (width, width),
        "output_bias": (width,),
        "norm1_weight": (width,),
        "norm1_bias": (width,),
        "up_weight": (intermediate, width),
        "up_bias": (intermediate,),
        "down_weight": (width, intermediate),
        "down_bias": (width,),
        "norm2_weight": (width,),
        "norm2_bias": (width,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return EncoderLayerWeights(
        **{
            name: (tensor * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else tensor).to(dtype)
            for name, tensor in tensors.items()
        }
    )


def draw_inputs(lengths, width, intermediate, layers, seed, share=0.6, dtype=torch.float32):
    """Packed rows of the given lengths, a random plan, and the weights of the layers."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    keep = torch.rand(len(lengths), layers, generator=generator) < share
    weights = [draw_weights(width, intermediate, generator, dtype) for _ in range(layers)]
    return hidden, keep, build_dispatch(keep, cu_seqlens, len(hidden)), weights


def cast(weights, dtype):
    return [EncoderLayerWeights(*(w.to(dtype) for w in layer)) for layer in weights]


def check_against_reference(hidden, dispatch, weights, heads, activation, **options):
    exact = reference.conditional_encoder(
        hidden.double(), dispatch, cast(weights, torch.float64), heads, activation
    )
    theirs = reference.conditional_encoder(hidden, dispatch, weights, heads, activation)
    ours = conditional_encoder(hidden, dispatch, weights, heads, activation, **options)
    assert_close_to_exact(ours, theirs, exact)
    return ours


@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    heads=st.integers(1, 4),
    head_width=st.sampled_from([1, 3, 8, 16, 20]),
    intermediate=st.integers(1, 70),
    layers=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(lengths, heads, head_width, intermediate, layers, activation, dtype, seed):
    hidden, keep, dispatch, weights = draw_inputs(
        lengths, heads * head_width, intermediate, layers, seed, dtype=dtype
    )
    with torch.no_grad():
        ours = check_against_reference(hidden, dispatch, weights, heads, activation)
    bypassed = ~keep.any(1).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert torch.equal(ours[bypassed], hidden[bypassed])


def test_gradients():
    hidden, _, dispatch, weights = draw_inputs([2, 0, 1, 3], 4, 3, 2, 0, dtype=torch.float64)
    inputs = [hidden, *weights[0], *weights[1], torch.rand(2, len(hidden), dtype=torch.float64)]

    def run(hidden, *tensors):
        layers = [EncoderLayerWeights(*tensors[:12]), EncoderLayerWeights(*tensors[12:24])]
        return conditional_encoder(hidden, dispatch, layers, 2, gates=tensors[24])

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_bypassed_rows_pass_the_gradient_through():
    hidden, _, _, weights = draw_inputs([3, 4], 8, 16, 1, 0)
    dispatch = build_dispatch(torch.tensor([False, True]), torch.tensor([0, 3, 7]).int(), 7)
    hidden.requires_grad_()
    conditional_encoder_layer(hidden, dispatch, weights[0], 2).sum().backward()
    assert torch.equal(hidden.grad[:3], torch.ones(3, 8)) and not torch.equal(
        hidden.grad[3:], torch.ones(4, 8)
    )


def test_training_and_inference_agree():
    hidden, _, dispatch, weights = draw_inputs([5, 1, 9], 32, 64, 3, 4)
    packed = [pack_encoder_weights(w) for w in weights]
    inference = conditional_encoder(hidden, dispatch, None, 4, packed_weights=packed)
    training = conditional_encoder(hidden.requires_grad_(), dispatch, weights, 4)
    torch.testing.assert_close(inference, training.detach(), rtol=1e-5, atol=1e-5)


def test_dropout_touches_active_rows_only():
    torch.manual_seed(0)
    hidden, keep, dispatch, weights = draw_inputs([5, 6], 8, 16, 1, 1, share=0)
    keep[1] = True
    dispatch = build_dispatch(keep, torch.tensor([0, 5, 11]).int(), 11)
    dropped = conditional_encoder(hidden, dispatch, weights, 2, dropout=0.5, attention_dropout=0.5)
    plain = conditional_encoder(hidden, dispatch, weights, 2)
    assert torch.equal(dropped[:5], hidden[:5]) and not torch.allclose(dropped[5:], plain[5:])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_equals_reference_on_every_instruction_set(isa, heads, activation):
    hidden, _, dispatch, weights = draw_inputs([7, 0, 30, 41], 40, 50, 2, 5)
    packed = [_native.pack_encoder_weights([w.numpy() for w in layer]) for layer in weights]
    got = _native.conditional_encoder(
        hidden.numpy(), *(d.numpy() for d in dispatch), packed, heads, activation, isa=isa
    )
    theirs = reference.conditional_encoder(hidden, dispatch, weights, heads, activation)
    exact = reference.conditional_encoder(
        hidden.double(), dispatch, cast(weights, torch.float64), heads, activation
    )
    assert_close_to_exact(torch.from_numpy(got), theirs, exact)


def test_bits_depend_on_nothing_but_the_sample():
    lengths = [5, 40, 1, 33, 64, 20]
    hidden, keep, dispatch, weights = draw_inputs(lengths, 48, 96, 3, 6)
    packed = [pack_encoder_weights(w) for w in weights]
    run = partial(conditional_encoder, hidden, dispatch, None, 4, packed_weights=packed)
    results = on_threads((1, 2, 3, 2), run)
    assert all(torch.equal(result, results[0]) for result in results)
    begin = 0
    for sample, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        alone = build_dispatch(keep[sample : sample + 1], torch.tensor([0, length]).int(), length)
        got = conditional_encoder(hidden[rows], alone, None, 4, packed_weights=packed)
        assert torch.equal(got, results[0][rows])
        begin += length


def test_two_threads_at_once():
    cases = [draw_inputs([5, 80, 3], 32, 64, 3, seed) for seed in range(2)]

    def run(case):
        hidden, _, dispatch, weights = case
        return [conditional_encoder(hidden, dispatch, weights, 4) for _ in range(20)]

    alone = [run(case)[0] for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(run, cases), strict=True):
            assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permuted_and_sliced_inputs(dtype):
    hidden, _, dispatch, weights = draw_inputs([4, 6], 16, 24, 2, 8, dtype=dtype)
    strided = torch.empty(16, 10, dtype=dtype).T.copy_(hidden)
    moved = type(dispatch)(*(torch.stack([d, d], -1)[..., 0] for d in dispatch))
    layers = [EncoderLayerWeights(*(torch.stack([w, w], -1)[..., 0] for w in layer)) for layer in weights]
    plain = conditional_encoder(hidden, dispatch, weights, 2)
    assert torch.equal(conditional_encoder(strided, moved, layers, 2), plain)
    packed = [torch.stack([pack_encoder_weights(w)] * 2, -1)[..., 0] for w in weights]
    assert torch.equal(conditional_encoder(hidden, dispatch, None, 2, packed_weights=packed), plain)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(lengths, dtype):
    hidden, _, dispatch, weights = draw_inputs(lengths, 8, 20, 2, 2, dtype=dtype)
    ops = torch.ops.dynplan
    torch.library.opcheck(ops.pack_encoder_weights.default, (list(weights[0]),))
    packed = [pack_encoder_weights(w) for w in weights]
    strided = torch.empty(8, len(hidden), dtype=dtype).T.copy_(hidden)
    for rows in (hidden, strided):
        torch.library.opcheck(ops.conditional_encoder.default, (rows, *dispatch, packed, 2, "gelu", 1e-5))
    torch.library.opcheck(
        ops.conditional_encoder_layer.default, (hidden, *dispatch.layer(0), packed[0], 2, "relu", 1e-5)
    )


def test_compiles_without_graph_breaks():
    hidden, _, dispatch, weights = draw_inputs([3, 5], 8, 20, 2, 2)
    packed = [pack_encoder_weights(w) for w in weights]

    def run(hidden):
        return conditional_encoder(hidden * 2, dispatch, None, 2, packed_weights=packed) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(hidden), run(hidden))


def test_nan_stays_in_its_sample():
    hidden, _, _, weights = draw_inputs([3, 4], 16, 24, 1, 0)
    dispatch = build_dispatch(torch.ones(2, 1).bool(), torch.tensor([0, 3, 7]).int(), 7)
    clean = conditional_encoder(hidden, dispatch, weights, 2)
    hidden[1, 5] = float("nan")
    got = conditional_encoder(hidden, dispatch, weights, 2)
    assert got[:3].isnan().all() and torch.equal(got[3:], clean[3:])


def test_weights_errors():
    _, _, _, [weights] = draw_inputs([1], 8, 20, 1, 0)
    for change, error, text in [
        ({"up_bias": torch.zeros(8)}, ValueError, r"up_bias to have shape \[20\], got \[8\]"),
        (
            {"norm1_bias": torch.zeros(8).half()},
            TypeError,
            "norm1_bias to be Float like qkv_weight, got Half",
        ),
        ({"output_weight": torch.zeros(8)}, ValueError, r"output_weight to have shape \(H, H\), got \[8\]"),
    ]:
        with pytest.raises(error, match="pack_encoder_weights: expected " + text):
            pack_encoder_weights(weights._replace(**change))
    with pytest.raises(TypeError, match="weights to be float32 or bfloat16 .*, got Double"):
        pack_encoder_weights(EncoderLayerWeights(*(w.double() for w in weights)))


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden to have shape \(T, H\), got \[3\]"),
        ({"num_heads": 3}, "num_heads to divide the width 8, got 3"),
        ({"activation": "mish"}, "activation to be one of gelu, .*, got mish"),
    ],
)
def test_errors(change, text, composed):
    hidden, _, dispatch, weights = draw_inputs([2, 1], 8, 4, 1, 0)
    arguments = {"hidden": hidden, "num_heads": 2, "activation": "gelu"} | change
    arguments["hidden"].requires_grad_(composed)
    with pytest.raises(ValueError, match="conditional_encoder: expected " + text):
        conditional_encoder(dispatch=dispatch, weights=weights, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rows": torch.zeros(1, 3)}, TypeError, "rows to be int32, got Float"),
        ({"rows": torch.zeros(1, 4).int()}, ValueError, r"rows to have shape \[1, 3\], got \[1, 4\]"),
        ({"rows": torch.tensor([[0, 3, 1]]).int()}, ValueError, r"rows in \[0, 3\), got 3 at 1"),
        ({"rows": torch.tensor([[0, 1, 1]]).int()}, ValueError, "rows to be distinct, got 1 again at 2"),
        ({"rows": torch.tensor([[-1, 1, 2]]).int()}, ValueError, r"rows in \[0, 3\), got -1 at 0"),
        ({"counts": torch.tensor([[3, 3]]).int()}, ValueError, "counts to be at most 2 samples and 3 rows"),
        ({"cu_seqlens": torch.tensor([[0, 5, 3]]).int()}, ValueError, "cu_seqlens to ascend, got 5 then 3"),
        ({"packed": torch.zeros(80).byte()}, ValueError, "packed_weights to come from pack_encoder_weights"),
        ({"packed": torch.zeros(80)}, TypeError, "packed_weights .* to be Byte, got Float"),
        ({"hidden": torch.zeros(3, 16)}, ValueError, "packed_weights of width 16, got 8"),
        ({"hidden": torch.zeros(3, 8).half()}, TypeError, "hidden to be float32 or bfloat16, got Half"),
    ],
)
def test_dispatch_errors(change, error, text):
    hidden, _, _, [weights] = draw_inputs([2, 1], 8, 4, 1, 0)
    dispatch = build_dispatch(torch.ones(2, 1).bool(), torch.tensor([0, 2, 3]).int(), 3)
    arguments = {"hidden": hidden, "packed": pack_encoder_weights(weights), **dispatch._asdict()} | change
    dispatch = Dispatch(*(arguments[name] for name in Dispatch._fields))
    with pytest.raises(error, match="conditional_encoder: expected " + text):
        conditional_encoder(arguments["hidden"], dispatch, None, 2, packed_weights=[arguments["packed"]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": torch.tensor([[0, 1, 1]]).int()}, r"rows to be distinct, got \[0, 1, 1\]"),
        ({"rows": torch.tensor([[0, 3, 1]]).int()}, r"rows in \[0, 3\), got 3"),
        ({"rows": torch.tensor([[-1, 1, 2]]).int()}, r"rows in \[0, 3\), got -1"),
        ({"cu_seqlens": torch.tensor([[0, 5, 3]]).int()}, r"cu_seqlens to ascend .*, got \[0, 5, 3\]"),
        ({"cu_seqlens": torch.tensor([[0, 2, 4]]).int()}, r"cu_seqlens to ascend from 0 to at most 3, got"),
        ({"cu_seqlens": torch.tensor([[1, 2, 3]]).int()}, r"cu_seqlens to ascend from 0 to at most 3, got"),
    ],
)
def test_dispatch_errors_where_gradients_are_wanted(change, text):
    hidden, _, _, weights = draw_inputs([2, 1], 8, 4, 1, 0)
    dispatch = build_dispatch(torch.ones(2, 1).bool(), torch.tensor([0, 2, 3]).int(), 3)._replace(**change)
    hidden.requires_grad_()
    with pytest.raises(ValueError, match="conditional_encoder: expected " + text):
        conditional_encoder(hidden, dispatch, weights, 2)
    with pytest.raises(ValueError, match="conditional_encoder_layer: expected " + text):
        conditional_encoder_layer(hidden, dispatch.layer(0), weights[0], 2)


def test_native_refuses_rows_that_are_not_distinct():
    hidden, _, _, [weights] = draw_inputs([2, 2], 8, 4, 1, 0)
    packed = _native.pack_encoder_weights([w.numpy() for w in weights])
    rows, offsets, counts = (np.array([x], np.int32) for x in ([0, 1, 0, 1], [0, 2, 4], [2, 4]))
    with pytest.raises(
        ValueError, match="conditional_encoder: expected rows to be distinct, got 0 again at 2"
    ):
        _native.conditional_encoder(hidden.numpy(), rows, offsets, counts, [packed], 2)
    with pytest.raises(ValueError, match="expected packed_weights to begin at a multiple of 8 bytes"):
        shifted = np.concatenate([packed[:1], packed])[1:]
        _native.conditional_encoder(
            hidden.numpy(), rows * 0 + np.arange(4, dtype=np.int32), offsets, counts, [shifted], 2
        )
    with pytest.raises(ValueError, match="pack_encoder_weights: expected sizes to be positive, got H = 0"):
        _native.pack_encoder_weights([np.zeros(0, np.float32)] * 12)


def test_rows_may_come_in_any_order_and_in_other_sequences_each_layer():
    """As no dispatch of build_dispatch has them: pieces must not wait for the wrong rows alone."""
    hidden, _, _, weights = draw_inputs([8] * 90, 16, 24, 3, 0)
    tokens = len(hidden)
    rows = torch.stack([torch.randperm(tokens) for _ in weights]).int()
    offsets = torch.arange(0, tokens + 1, 8).int()
    counts = torch.tensor([90, tokens]).int()
    dispatch = Dispatch(rows, offsets.expand(3, -1).contiguous(), counts.expand(3, -1).contiguous())
    packed = [pack_encoder_weights(w) for w in weights]
    expected = hidden
    for layer in range(3):
        expected = conditional_encoder_layer(
            expected, dispatch.layer(layer), None, 2, packed_weights=packed[layer]
        )
    for got in on_threads(
        [1, 2, 4] * 5, lambda: conditional_encoder(hidden, dispatch, None, 2, packed_weights=packed)
    ):
        assert torch.equal(got, expected)
