"""Bools whose bytes are not 0 and 1, which PyTorch makes (a view of uint8) and takes as True."""

import numpy as np
import pytest
import torch
from helpers import DEVICES
from ops.test_conditional_encoder_layer import draw_weights
from ops.test_embed_tokens import draw_inputs

from dynplan import _native
from dynplan.ops import build_dispatch, embed_tokens, encode_tokens, pack, pack_encoder_weights

PLAIN = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
BYTES = torch.tensor([[255, 0, 2, 1], [0, 0, 0, 0], [128, 3, 254, 77]], dtype=torch.uint8).view(torch.bool)


def equal(ours, theirs):
    return all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [BYTES, BYTES.t().contiguous().t()], ids=["dense", "strided"])
def test_pack(mask, device):
    hidden, mask = torch.randn(3, 4, 5, device=device), mask.to(device)
    assert equal(pack(hidden, mask), pack(hidden, PLAIN.to(device)))
    if device == "cpu":
        native = [_native.pack(hidden.numpy(), m.numpy().copy()) for m in (mask, PLAIN)]
        assert equal(*native) and equal(native[0], pack(hidden, PLAIN))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "keep", [BYTES, BYTES.t().contiguous().t(), BYTES[:, 2]], ids=["dense", "strided", "one"]
)
def test_build_dispatch(keep, device):
    plain = PLAIN if keep.dim() == 2 else PLAIN[:, 2]
    cu_seqlens = torch.tensor([0, 2, 5, 9], dtype=torch.int32, device=device)
    expected = build_dispatch(plain.to(device), cu_seqlens, 9)
    assert equal(build_dispatch(keep.to(device), cu_seqlens, 9), expected)
    if device == "cpu" and keep.dim() == 2:
        native = _native.build_dispatch(np.ascontiguousarray(keep.numpy()), cu_seqlens.numpy())
        assert equal(native, expected)


@torch.no_grad()
def test_embed_and_encode():
    inputs = draw_inputs(3, 4, 16)
    generator = torch.Generator().manual_seed(0)
    packed = [pack_encoder_weights(draw_weights(16, 24, generator)) for _ in range(4)]
    embedded, encoded, native = [], [], []
    for bools in (PLAIN, BYTES):
        inputs[1] = bools
        embedded.append(embed_tokens(*inputs))
        encoded.append(encode_tokens(*inputs, 1e-5, None, bools, packed, 2))
        native.append(_native.embed_tokens(*(x.numpy() for x in inputs), eps=1e-12))
    assert equal(*embedded) and torch.equal(*encoded) and np.array_equal(*native)
