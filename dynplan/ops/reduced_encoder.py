"""Weights of encoder layers in int8 or bfloat16, for ``conditional_encoder`` on a CPU."""

import torch
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.conditional_encoder_layer import EncoderLayerWeights, packed_bytes

_pack_reduced_encoder_weights = find_op("pack_reduced_encoder_weights")

REDUCED_DTYPES = ("bfloat16", "int8")


def pack_reduced_encoder_weights(weights: EncoderLayerWeights, dtype: str) -> Tensor:
    """One layer's weights for products in a narrower type, as ``packed_weights`` of ``conditional_encoder``.

    Attention, norms, activations, biases and the residual stream stay float32.

    int8 is dynamic and symmetric: a channel ``n`` of a weight ``W (N, K)`` becomes the integers nearest to
    ``W[n] / t[n]``, ``t[n] = max |W[n]| / 127``, once; a row ``x[r]`` that meets it those nearest to ``x[r] /
    s[r]``, ``s[r] = max |x[r]| / 127``, each time; their sums are exact (Jacob et al. 2018, section 2,
    without zero points). Where the CPU lacks VNNI instructions sums of such integers would clip, and weights
    get 64 levels instead of 127.

    bfloat16 rounds weights and, where the CPU multiplies bfloat16 itself (AVX512-BF16), the rows that meet
    them; sums are float32. Elsewhere rows stay float32 and weights are widened on the way: half of the memory
    to read, and more exact.

    Either way the bits of a sample depend neither on the rest of the batch nor on the number of threads.

    Args:
        weights: as for :func:`~dynplan.ops.pack_encoder_weights`, float32 or bfloat16, on CPU. The result
            does not share memory with them.
        dtype: "int8" or "bfloat16".

    Returns:
        uint8 (bytes,), opaque, for CPUs like this one.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the text names the argument.
    """
    return _pack_reduced_encoder_weights([w.detach() for w in weights], dtype)


@torch.library.register_fake("dynplan::pack_reduced_encoder_weights")
def _pack_reduced_encoder_weights_fake(weights: list[Tensor], dtype: str) -> Tensor:
    torch._check_value(
        dtype in REDUCED_DTYPES,
        lambda: f"pack_reduced_encoder_weights: expected dtype to be int8 or bfloat16, got {dtype}",
    )
    h, i = weights[2].shape[0], weights[6].shape[0]
    if dtype == "bfloat16":
        return weights[0].new_empty((packed_bytes(h, i, pairs=True),), dtype=torch.uint8)

    # ReducedLayout of kernels/encoder/packed_weights.h: a header of 64 bytes, then sections of such multiples
    def section(length):
        return (length + 63) // 64 * 64

    def matrix(columns, depth):
        return section(columns * depth) + 2 * section(4 * columns)

    length = 64 + matrix(3 * h, h) + matrix(h, h) + matrix(i, h) + matrix(h, i) + 4 * section(4 * h)
    return weights[0].new_empty((length,), dtype=torch.uint8)
