"""The specification of ``conditional_encoder_layer`` and ``conditional_encoder`` in eager PyTorch.

Post-norm encoder layer (Vaswani et al. 2017, section 3.1, as BERT orders it):

    x1 = LayerNorm(x + Wo attention(x) + bo)
    x2 = LayerNorm(x1 + W2 act(W1 x1 + b1) + b2)

run on the active rows only. Every other row of ``hidden`` comes out bit for bit as it went in.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for one sequence; q, k, v are (S, heads, d)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def conditional_encoder_layer(
    hidden: Tensor,
    dispatch,
    weights,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    linear=F.linear,
) -> Tensor:
    """One layer over packed rows. See ``dynplan.ops.conditional_encoder_layer`` for the arguments.

    linear: makes ``x weight^T + bias``; ``dynplan.reference.reduced_encoder`` has others.
    """
    width = hidden.shape[1]
    sequences, active = dispatch.counts.tolist()
    rows = dispatch.rows[:active].long()
    x = hidden[rows]

    qkv = linear(x, weights.qkv_weight, weights.qkv_bias).view(active, 3, num_heads, width // num_heads)
    offsets = dispatch.cu_seqlens[: sequences + 1].tolist()
    context = torch.cat(
        [attention(*qkv[begin:end].unbind(1)) for begin, end in itertools.pairwise(offsets)]
        or [x.new_empty(0, num_heads, width // num_heads)]
    ).reshape(active, width)

    x = x + linear(context, weights.output_weight, weights.output_bias)
    x = F.layer_norm(x, (width,), weights.norm1_weight, weights.norm1_bias, eps)
    up = ACTIVATIONS[activation](linear(x, weights.up_weight, weights.up_bias))
    x = x + linear(up, weights.down_weight, weights.down_bias)
    x = F.layer_norm(x, (width,), weights.norm2_weight, weights.norm2_bias, eps)

    out = hidden.clone()
    out[rows] = x
    return out


def conditional_encoder(
    hidden: Tensor,
    dispatch,
    weights,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    linear=F.linear,
) -> Tensor:
    """All layers of an upfront plan, one after another; ``dispatch`` has one row per layer."""
    for layer, layer_weights in enumerate(weights):
        step = type(dispatch)(dispatch.rows[layer], dispatch.cu_seqlens[layer], dispatch.counts[layer])
        hidden = conditional_encoder_layer(hidden, step, layer_weights, num_heads, activation, eps, linear)
    return hidden
