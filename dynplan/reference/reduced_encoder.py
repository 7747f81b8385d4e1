"""The specification of ``conditional_encoder`` on weights of ``pack_reduced_encoder_weights``, in eager
PyTorch.

The layer is that of :mod:`dynplan.reference.conditional_encoder_layer`; its four products are

    int8      y[r, n] = s[r] t[n] sum_k a[r, k] w[n, k] + bias[n]
              s[r] = max |x[r]| / 127,       a[r] = round(x[r] / s[r])     for every product anew
              t[n] = max |W[n]| / levels,    w[n] = round(W[n] / t[n])
    bfloat16  y = bfloat16(x) bfloat16(W)^T + bias, or x bfloat16(W)^T + bias where rows are not rounded

and everything between them is float32.
"""

from functools import partial

import torch
from torch import Tensor

from dynplan.reference.conditional_encoder_layer import conditional_encoder

ROW_LEVELS = 127


def quantize(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Integers of magnitude ``levels`` at most, and the scale ``(N, 1)`` of each row of ``x`` ``(N, K)``."""
    scale = x.abs().amax(1, keepdim=True) / levels
    return torch.where(scale == 0, 0, x / scale).round().to(torch.int32), scale


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor, levels: int = 127) -> Tensor:
    """``x weight^T + bias`` from exact sums of integers."""
    a, row_scale = quantize(x, ROW_LEVELS)
    w, channel_scale = quantize(weight, levels)
    return (a @ w.T).to(x.dtype) * row_scale * channel_scale.T + bias


def bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor, rounds_rows: bool = True) -> Tensor:
    """``x weight^T + bias`` of operands rounded to bfloat16, the weight alone or both."""
    rows = x.bfloat16().to(x.dtype) if rounds_rows else x
    return rows @ weight.bfloat16().to(x.dtype).T + bias


def reduced_encoder(
    hidden: Tensor, dispatch, weights, *shape, dtype: str, levels: int = 127, rounds_rows: bool = True
) -> Tensor:
    """All layers of an upfront plan; ``weights`` in full, ``dtype`` of the products, ``levels`` of int8
    weights, and whether bfloat16 rounds rows too."""
    if dtype == "bfloat16":
        linear = partial(bfloat16_linear, rounds_rows=rounds_rows)
    else:
        linear = partial(int8_linear, levels=levels)
    return conditional_encoder(hidden, dispatch, weights, *shape, linear=linear)
