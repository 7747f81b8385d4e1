"""One encoder layer on the active rows, against the masked layer: compute all samples, then select."""

import pytest
import torch
import torch.nn.functional as F

from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder_layer,
    pack,
    pack_encoder_weights,
    unpack,
)

# batch, longest, width, heads
SHAPES = {"small b32": (32, 45, 384, 12), "small b1": (1, 25, 384, 12), "base b8": (8, 128, 768, 12)}


def draw(shape):
    batch, longest, width, heads = shape
    generator = torch.Generator().manual_seed(0)

    def tensor(*size):
        return torch.randn(size, generator=generator) * size[-1] ** -0.5

    up = 4 * width
    weights = EncoderLayerWeights(
        *(tensor(3 * width, width), tensor(3 * width), tensor(width, width), tensor(width)),
        *(tensor(width), tensor(width), tensor(up, width), tensor(up)),
        *(tensor(width, up), tensor(width), tensor(width), tensor(width)),
    )
    lengths = torch.randint(longest // 3, longest + 1, (batch, 1), generator=generator)
    lengths[0] = longest
    hidden = torch.randn(batch, longest, width, generator=generator)
    return hidden, torch.arange(longest) < lengths, weights, heads, generator


def masked_layer(hidden, mask, keep, w, heads):
    """All samples, padding included, through the layer; bypassed ones keep their old states."""
    batch, length, width = hidden.shape
    q, k, v = (
        F.linear(hidden, w.qkv_weight, w.qkv_bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    context = context.transpose(1, 2).reshape(batch, length, width)
    y = hidden + F.linear(context, w.output_weight, w.output_bias)
    y = F.layer_norm(y, (width,), w.norm1_weight, w.norm1_bias, 1e-12)
    up = F.gelu(F.linear(y, w.up_weight, w.up_bias))
    y = y + F.linear(up, w.down_weight, w.down_bias)
    y = F.layer_norm(y, (width,), w.norm2_weight, w.norm2_bias, 1e-12)
    return torch.where(keep[:, None, None], y, hidden)


@pytest.mark.parametrize("impl", ["masked", "dynplan", "dynplan half", "dynplan none"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_conditional_encoder_layer(measure, shape, impl):
    hidden, mask, weights, heads, generator = draw(SHAPES[shape])
    batch, length, _ = hidden.shape
    share = {"dynplan half": 0.5, "dynplan none": 0.0}.get(impl, 1.0)
    keep = torch.zeros(batch, dtype=torch.bool)
    keep[torch.randperm(batch, generator=generator)[: round(share * batch)]] = True
    packed = pack(hidden, mask)
    blob = pack_encoder_weights(weights)
    dispatch = build_dispatch(keep, packed.cu_seqlens, len(packed.hidden))

    def masked():
        return masked_layer(hidden, mask, keep, weights, heads)

    def dynplan():
        return conditional_encoder_layer(packed.hidden, dispatch, None, heads, packed_weights=blob)

    got = unpack(dynplan(), packed.indices, batch, length)
    torch.testing.assert_close(got, masked() * mask[..., None], rtol=1e-4, atol=1e-4)
    measure(
        masked if impl == "masked" else dynplan,
        op="conditional_encoder_layer",
        impl=impl,
        shape=shape,
        dtype=hidden.dtype,
        baseline="masked",
    )
