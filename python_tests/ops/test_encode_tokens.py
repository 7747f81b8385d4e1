"""encode_tokens against its reference, and to the bit against the four ops it stands for."""

import pytest
import torch
from helpers import assert_close_to_exact, on_threads
from hypothesis import given
from hypothesis import strategies as st
from ops.test_conditional_encoder_layer import cast, draw_weights
from ops.test_embed_tokens import draw_inputs as draw_embeddings

from dynplan.ops import (
    build_dispatch,
    conditional_encoder,
    embed_tokens,
    encode_tokens,
    pack_encoder_weights,
    pack_reduced_encoder_weights,
    unpack,
)
from dynplan.reference.encode_tokens import encode_tokens as reference

OP = torch.ops.dynplan.encode_tokens.default
HEADS = 2


def draw(batch_size=3, length=7, width=16, layers=2, seed=0, padding_idx=None):
    """ids, mask, types; the embeddings' arguments from the tables on; the plan; the layers' weights."""
    generator = torch.Generator().manual_seed(seed)
    inputs = draw_embeddings(batch_size, length, width, seed)
    keep = torch.rand(batch_size, layers, generator=generator) < 0.6
    weights = [draw_weights(width, 24, generator) for _ in range(layers)]
    return inputs[:3], (*inputs[3:], 1e-5, padding_idx), keep, weights


def four_ops(batch, embeddings, keep, packed, *shape):
    hidden, indices, cu_seqlens = embed_tokens(*batch, *embeddings)
    if keep is None:
        keep = torch.ones(len(batch[0]), len(packed), dtype=torch.bool)
    dispatch = build_dispatch(keep, cu_seqlens, len(hidden))
    hidden = conditional_encoder(hidden, dispatch, None, *shape, packed_weights=packed)
    return unpack(hidden, indices, *batch[0].shape)


@given(
    batch_size=st.integers(0, 5),
    length=st.integers(0, 9),
    width=st.sampled_from([4, 16, 34]),
    layers=st.integers(0, 3),
    seed=st.integers(0, 2**16),
    mask=st.sampled_from([None, torch.bool, torch.int64]),
    typed=st.booleans(),
    planned=st.booleans(),
    padding_idx=st.sampled_from([None, 1]),
    activation=st.sampled_from(["gelu", "silu"]),
)
@torch.no_grad()
def test_equals_reference(
    batch_size, length, width, layers, seed, mask, typed, planned, padding_idx, activation
):
    batch, embeddings, keep, weights = draw(batch_size, length, width, layers, seed, padding_idx)
    batch[1] = None if mask is None else batch[1].to(mask)
    batch[2] = batch[2] if typed else None
    keep = keep if planned else None
    shape = HEADS, activation, 1e-6
    packed = [pack_encoder_weights(layer) for layer in weights]
    got = encode_tokens(*batch, *embeddings, keep, packed, *shape)
    assert torch.equal(got, four_ops(batch, embeddings, keep, packed, *shape))
    theirs = reference(*batch, embeddings, keep, weights, *shape)
    double = tuple(x.double() if isinstance(x, torch.Tensor) else x for x in embeddings)
    exact = reference(*batch, double, keep, cast(weights, torch.float64), *shape)
    assert_close_to_exact(got, theirs, exact)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("batch_size", "length"), [(1, 5), (2, 40), (40, 30)], ids=["columns", "rows", "flow"]
)
@torch.no_grad()
def test_bits_depend_on_nothing_else(batch_size, length, dtype):
    batch, embeddings, keep, weights = draw(batch_size, length, 32, 3)
    batch[1] |= torch.arange(length) < 2
    pack = pack_encoder_weights if dtype is None else lambda w: pack_reduced_encoder_weights(w, dtype)
    packed = [pack(layer) for layer in weights]
    shape = HEADS, "gelu", 1e-6
    for mask in (batch[1], None):
        run = [batch[0], mask, batch[2]]
        one, two = on_threads((1, 2), lambda run=run: encode_tokens(*run, *embeddings, keep, packed, *shape))
        assert torch.equal(one, two)
        assert torch.equal(one, four_ops(run, embeddings, keep, packed, *shape))
        strided = keep.t().contiguous().t()
        assert torch.equal(one, encode_tokens(*run, *embeddings, strided, packed, *shape))
    none = encode_tokens(*batch, *embeddings, torch.zeros_like(keep), packed, *shape)
    assert torch.equal(none, unpack(*embed_tokens(*batch, *embeddings)[:2], batch_size, length))


@pytest.mark.parametrize("length", [5, 300])
@torch.no_grad()
def test_without_layers(length):
    batch, embeddings, _, _ = draw(3, length)
    expected = unpack(*embed_tokens(*batch, *embeddings)[:2], 3, length)
    got = on_threads((1, 2), lambda: encode_tokens(*batch, *embeddings, None, [], HEADS))
    assert all(torch.equal(one, expected) for one in got)


@torch.no_grad()
def test_weights_at_any_address():
    batch, embeddings, keep, weights = draw()
    packed = [pack_encoder_weights(layer) for layer in weights]
    shifted = [torch.cat([blob.new_zeros(1), blob])[1:] for blob in packed]
    assert torch.equal(*(encode_tokens(*batch, *embeddings, keep, p, HEADS) for p in (packed, shifted)))


@pytest.mark.parametrize("batch_size", [0, 3])
@pytest.mark.parametrize("given", [True, False])
def test_opcheck(batch_size, given):
    batch, embeddings, keep, weights = draw(batch_size)
    packed = [pack_encoder_weights(layer) for layer in weights]
    if not given:
        batch[1] = batch[2] = keep = None
    torch.library.opcheck(OP, (*batch, *embeddings, keep, packed, HEADS, "gelu", 1e-6, False))


@torch.no_grad()
def test_first_position():
    batch, embeddings, keep, weights = draw(3, 5)
    packed = [pack_encoder_weights(layer) for layer in weights]
    rest = (*embeddings, keep, packed, HEADS, "gelu", 1e-6)
    for mask in (None, torch.tensor([[1, 1, 1, 0, 0], [0] * 5, [1] * 5])):
        got = encode_tokens(batch[0], mask, None, *rest, True)
        assert torch.equal(got, encode_tokens(batch[0], mask, None, *rest))
    mask = torch.tensor([[1] * 5, [0, 1, 1, 1, 1], [1] * 5])
    with pytest.raises(ValueError, match="encode_tokens: expected attention_mask to keep .* in sample 1"):
        encode_tokens(batch[0], mask, None, *rest, True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input_ids": torch.zeros(3)}, ValueError, r"input_ids to have shape \(B, S\), got \[3\]"),
        ({"input_ids": torch.full((3, 7), 99)}, IndexError, "input_ids within 0..12, got 99"),
        ({"attention_mask": torch.ones(3, 7)}, TypeError, "attention_mask to be bool or integer, got Float"),
        ({"keep": torch.ones(3, 2)}, TypeError, "keep to be bool, got Float"),
        ({"keep": torch.ones(2).bool()}, ValueError, r"keep to have shape \(B, L\) = \[3, 2\], got \[2\]"),
        ({"padding_idx": -1}, ValueError, "padding_idx to be within 0..10, got -1"),
        ({"padding_idx": 2**32 - 5}, ValueError, "padding_idx to be within 0..10, got 4294967291"),
        ({"num_heads": 3}, ValueError, "num_heads to divide the width 16, got 3"),
        ({"activation": "tanh"}, ValueError, "activation to be one of gelu, .*, got tanh"),
        ({"packed_weights": [torch.zeros(3)] * 2}, TypeError, "packed_weights .* to be Byte, got Float"),
        ({"packed_weights": [torch.zeros(99).byte()] * 2}, ValueError, "packed_weights to come from"),
        ({"word": torch.zeros(13, 16).double()}, TypeError, "word to be float32, got Double"),
    ],
)
@torch.no_grad()
def test_errors(change, error, text):
    batch, embeddings, keep, weights = draw()
    names = ("input_ids", "attention_mask", "token_type_ids", "word", "type", "position")
    names += ("norm_weight", "norm_bias", "norm_eps", "padding_idx", "keep", "packed_weights", "num_heads")
    packed = [pack_encoder_weights(layer) for layer in weights]
    arguments = dict(zip(names, (*batch, *embeddings, keep, packed, HEADS), strict=True))
    with pytest.raises(error, match="encode_tokens: expected " + text):
        encode_tokens(**arguments | change)
