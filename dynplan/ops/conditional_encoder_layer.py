"""Encoder layers that run on the active rows of a packed batch and leave every other row as it is.

Two ways through, one result:

- Inference: one C++ call for a layer, or for the whole planned encoder, on weights packed once
  (:func:`pack_encoder_weights`).
- Training: a composition of PyTorch operations over the active rows, so that autograd, dropout,
  autocast and double precision work. Taken when a gradient is wanted, when ``dropout``,
  ``attention_dropout`` or ``gates`` are given, and for float64 rows. Its shapes are those of the
  active rows, so it reads the offsets back from the device, once a call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.build_dispatch import Dispatch

_pack_encoder_weights = find_op("pack_encoder_weights")
_conditional_encoder_layer = find_op("conditional_encoder_layer")
_conditional_encoder = find_op("conditional_encoder")

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class EncoderLayerWeights(NamedTuple):
    """Weights of one post-norm encoder layer, width H, feed-forward width I, as ``nn.Linear`` keeps them.

    All of one floating dtype: float32, bfloat16 or float64, on CUDA also float16.

    Attributes:
        qkv_weight: (3H, H), dtype of all: query, key, value one under the other.
        qkv_bias: (3H,), dtype of all.
        output_weight: (H, H), dtype of all.
        output_bias: (H,), dtype of all.
        norm1_weight: (H,), dtype of all; the norm after attention.
        norm1_bias: (H,), dtype of all.
        up_weight: (I, H), dtype of all.
        up_bias: (I,), dtype of all.
        down_weight: (H, I), dtype of all.
        down_bias: (H,), dtype of all.
        norm2_weight: (H,), dtype of all; the norm after the feed-forward.
        norm2_bias: (H,), dtype of all.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


def pack_encoder_weights(weights: EncoderLayerWeights) -> Tensor:
    """Copy one layer's weights into the layout the kernels of their device read, one opaque blob.

    Args:
        weights: tensors of one dtype (float32 or bfloat16, on CUDA also float16) on one device; shapes in
            :class:`EncoderLayerWeights`. The result does not share memory with them.

    Returns:
        CPU: uint8 (bytes,), columns in panels; holds float32 whatever the weights' dtype. It depends on no
        CPU feature, so it may be made on one machine and used on another of the same byte order.
        CUDA: (N,), the parameters end to end in their own dtype, which must be that of the rows.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit together.
    """
    return _pack_encoder_weights([w.detach() for w in weights])


def conditional_encoder_layer(
    hidden: Tensor,
    dispatch: Dispatch,
    weights: EncoderLayerWeights,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    *,
    packed_weights: Tensor | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    gates: Tensor | None = None,
) -> Tensor:
    """One post-norm encoder layer on the active rows; every other row passes bit for bit.

    ``x1 = LayerNorm(x + Wo attention(x) + bo)``, ``x2 = LayerNorm(x1 + W2 act(W1 x1 + b1) + b2)``
    (Vaswani et al. 2017, section 3.1, in BERT's order). Attention is inside each sequence. Work is
    proportional to the active rows; a layer that no sample takes costs nothing.

    Args:
        hidden: (T, H) float32, bfloat16 or float64 (on CUDA also float16), the packed rows of the batch.
        dispatch: of ``build_dispatch`` for one layer: ``rows`` int32 (T,), ``cu_seqlens`` int32 (B+1,),
            ``counts`` int32 (2,).
        weights: the layer's weights. May be None with ``packed_weights`` in inference.
        num_heads: attention heads; divides H.
        activation: "gelu" (exact), "gelu_new" or "gelu_pytorch_tanh" (tanh form), "relu", "silu".
        eps: of both layer norms.
        packed_weights: ``pack_encoder_weights(weights)``, used by the inference path; packed on
            the spot when absent, which costs about as much as the layer on 30 rows.
        dropout: probability on both residual branches (training; at inference pass 0).
        attention_dropout: probability on the attention weights.
        gates: (T,) floating, one per packed row, for training planners: active rows become
            ``g * layer(x) + (1 - g) * x``, with the gradient of ``g``. Rows that the dispatch bypasses
            ignore their gate.

    Returns:
        (T, H), dtype of ``hidden``. Bypassed rows hold the bits, and pass the gradient, of ``hidden``.
        The same sample gives the same bits whatever else is in the batch and however many threads run.

    Raises:
        ValueError, TypeError: an argument's shape, value, device or dtype is wrong; the text names it.
    """
    if _is_composed(hidden, [weights], dropout, attention_dropout, gates):
        _check("conditional_encoder_layer", hidden, num_heads, activation)
        sizes = _check_dispatch("conditional_encoder_layer", hidden, dispatch, dispatch.cu_seqlens.tolist())
        return _compose_layer(
            hidden, dispatch, sizes, weights, num_heads, activation, eps, dropout, attention_dropout, gates
        )
    if packed_weights is None:
        packed_weights = pack_encoder_weights(weights)
    return _conditional_encoder_layer(hidden, *dispatch, packed_weights, num_heads, activation, eps)


def conditional_encoder(
    hidden: Tensor,
    dispatch: Dispatch,
    weights: Sequence[EncoderLayerWeights] | None,
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    *,
    packed_weights: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    gates: Tensor | None = None,
) -> Tensor:
    """A whole planned encoder in one call: L times :func:`conditional_encoder_layer`, plan known up front.

    Args:
        hidden: (T, H), as for one layer.
        dispatch: of ``build_dispatch`` for all layers: ``rows`` int32 (L, T), ``cu_seqlens`` int32
            (L, B+1), ``counts`` int32 (L, 2).
        weights: L layers' weights; may be None with ``packed_weights`` in inference.
        packed_weights: L packed blobs, one per layer; of ``pack_encoder_weights``, or on CPU of
            ``pack_reduced_encoder_weights``, all of one dtype.
        gates: (L, T) floating, one per layer and packed row.
        num_heads, activation, eps, dropout, attention_dropout: as for one layer.

    Returns:
        (T, H), dtype of ``hidden``.

    Raises:
        ValueError, TypeError: an argument's shape, value, device or dtype is wrong; the text names it.
    """
    if not _is_composed(hidden, weights, dropout, attention_dropout, gates):
        if packed_weights is None:
            packed_weights = [pack_encoder_weights(layer) for layer in weights]
        return _conditional_encoder(hidden, *dispatch, packed_weights, num_heads, activation, eps)
    _check("conditional_encoder", hidden, num_heads, activation)
    offsets = dispatch.cu_seqlens.tolist()
    for layer, layer_weights in enumerate(weights):
        gate = None if gates is None else gates[layer]
        hidden = _compose_layer(
            hidden,
            dispatch.layer(layer),
            _check_dispatch("conditional_encoder", hidden, dispatch.layer(layer), offsets[layer]),
            layer_weights,
            num_heads,
            activation,
            eps,
            dropout,
            attention_dropout,
            gate,
        )
    return hidden


def _is_composed(hidden, weights, dropout, attention_dropout, gates) -> bool:
    if dropout > 0 or attention_dropout > 0 or gates is not None or hidden.dtype == torch.float64:
        return True
    if not torch.is_grad_enabled():
        return False
    return hidden.requires_grad or any(w.requires_grad for layer in weights or () for w in layer or ())


def _check(op: str, hidden: Tensor, num_heads: int, activation: str) -> None:
    torch._check_value(
        hidden.dim() == 2,
        lambda: f"{op}: expected hidden to have shape (T, H), got {list(hidden.shape)}",
    )
    check_options(op, hidden.shape[1], num_heads, activation)


def check_options(op: str, width: int, num_heads: int, activation: str) -> None:
    """What every op with an encoder in it asks for, as the compiled ops word it."""
    torch._check_value(
        num_heads > 0 and width % num_heads == 0,
        lambda: f"{op}: expected num_heads to divide the width {width}, got {num_heads}",
    )
    torch._check_value(
        activation in ACTIVATIONS,
        lambda: f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation}",
    )


class ActiveSizes(NamedTuple):
    """What the host must know of a dispatch to shape the active rows."""

    sequences: int  # active sequences, without empty ones at the end
    rows: int
    longest: int  # rows of the longest sequence


def active_sizes(offsets: Sequence[int]) -> ActiveSizes:
    """Of ``cu_seqlens`` of one layer's dispatch, as Python numbers."""
    rows = offsets[-1]
    lengths = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    return ActiveSizes(offsets.index(rows), rows, max(lengths, default=0))


def _check_dispatch(op: str, hidden: Tensor, dispatch: Dispatch, offsets: list[int]) -> ActiveSizes:
    """The sizes of a layer's dispatch, which is checked as the compiled ops check it; rows on CPU alone."""
    sizes, tokens = active_sizes(offsets), len(hidden)
    torch._check_value(
        offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= tokens,
        lambda: f"{op}: expected cu_seqlens to ascend from 0 to at most {tokens}, got {offsets}",
    )
    rows = dispatch.rows[: sizes.rows]
    if rows.device.type != "cpu" or sizes.rows == 0:
        return sizes
    ascends = bool((rows[1:] > rows[:-1]).all())  # as in every dispatch of build_dispatch
    lowest, highest = (rows[[0, -1]] if ascends else torch.stack(rows.aminmax())).tolist()
    torch._check_value(
        lowest >= 0 and highest < tokens,
        lambda: f"{op}: expected rows in [0, {tokens}), got {lowest if lowest < 0 else highest}",
    )
    torch._check_value(
        ascends or len(rows.unique()) == sizes.rows,
        lambda: f"{op}: expected rows to be distinct, got {rows.tolist()}",
    )
    return sizes


def _compose_layer(
    hidden, dispatch, sizes, weights, num_heads, activation, eps, dropout, attention_dropout, gates
) -> Tensor:
    """The layer from PyTorch operations on the active rows, differentiable in everything floating."""
    if sizes.rows == 0:
        return hidden
    width = hidden.shape[1]
    rows = dispatch.rows[: sizes.rows].long()
    x = hidden.index_select(0, rows)

    qkv = F.linear(x, weights.qkv_weight, weights.qkv_bias)
    context = attend_packed(qkv, dispatch.cu_seqlens, sizes, num_heads, attention_dropout)
    branch = F.linear(context, weights.output_weight, weights.output_bias)
    y = x + F.dropout(branch, dropout)
    y = F.layer_norm(y, (width,), weights.norm1_weight, weights.norm1_bias, eps)
    up = ACTIVATIONS[activation](F.linear(y, weights.up_weight, weights.up_bias))
    branch = F.linear(up, weights.down_weight, weights.down_bias)
    y = F.layer_norm(y + F.dropout(branch, dropout), (width,), weights.norm2_weight, weights.norm2_bias, eps)

    if gates is not None:
        gate = gates.index_select(0, rows).unsqueeze(1)
        y = gate * y + (1 - gate) * x
    return hidden.index_copy(0, rows, y.to(hidden.dtype))


def attend_packed(
    qkv: Tensor,
    cu_seqlens: Tensor,
    sizes: ActiveSizes,
    num_heads: int,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the packed rows (N, 3H), padded to the longest active sequence for one SDPA call.

    ``bias`` (1, heads, S, S), S at least that longest, is added to the scores of rows i and j of a sequence.
    """
    sequences, rows, longest = sizes
    lengths = cu_seqlens[: sequences + 1].diff()
    # Sequence s begins at row cu_seqlens[s], and at s * longest among the padded ones.
    shift = torch.arange(sequences, device=qkv.device) * longest - cu_seqlens[:sequences]
    slots = torch.arange(rows, device=qkv.device) + shift.repeat_interleave(lengths, output_size=rows)
    # A sequence without rows attends to one of zeros, lest its softmax be over nothing.
    mask = torch.arange(longest, device=qkv.device) < lengths.clamp_min(1).unsqueeze(1)
    padded = qkv.new_zeros(sequences * longest, qkv.shape[1]).index_copy(0, slots, qkv)
    q, k, v = padded.view(sequences, longest, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    mask = mask[:, None, None, :]
    if bias is not None:
        mask = bias[..., :longest, :longest].to(q.dtype).masked_fill(~mask, -torch.inf)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).reshape(sequences * longest, -1).index_select(0, slots)


def packed_bytes(h: int, i: int, pairs: bool) -> int:
    """Size of a CPU's blob of weights in float32, or in bfloat16, two to a lane: PackedLayout of
    kernels/encoder/packed_weights.h, a header of 64 bytes and panels of 16 columns."""

    def padded(size):
        return (size + 15) // 16 * 16

    def steps(depth):
        return (depth + 1) // 2 if pairs else depth

    lanes = (padded(3 * h) + padded(h) + padded(i)) * (steps(h) + 1) + padded(h) * (steps(i) + 5)
    return 64 + 4 * lanes


@torch.library.register_fake("dynplan::pack_encoder_weights")
def _pack_encoder_weights_fake(weights: list[Tensor]) -> Tensor:
    if weights[0].is_cuda:
        return weights[0].new_empty((sum(w.numel() for w in weights),))
    size = packed_bytes(weights[2].shape[0], weights[6].shape[0], pairs=False)
    return weights[0].new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("dynplan::conditional_encoder_layer")
def _conditional_encoder_layer_fake(
    hidden, rows, cu_seqlens, counts, packed_weights, num_heads, activation, eps
) -> Tensor:
    _check("conditional_encoder_layer", hidden, num_heads, activation)
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("dynplan::conditional_encoder")
def _conditional_encoder_fake(
    hidden, rows, cu_seqlens, counts, packed_weights, num_heads, activation, eps
) -> Tensor:
    _check("conditional_encoder", hidden, num_heads, activation)
    return hidden.new_empty(hidden.shape)
