"""A planned encoder on padded states and the layers' own weights: what an exported or traced model runs.

Packing, dispatch, the encoder and padding restored, in one op without sizes that depend on data. The weights
come as the modules keep them, so that a saved program holds them once and a write to them is seen; what the
kernels read is packed at the first call and kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from dynplan.ops.build_dispatch import build_dispatch
from dynplan.ops.conditional_encoder_layer import check_options, conditional_encoder
from dynplan.ops.pack import Packed, pack, unpack
from dynplan.ops.packed_weights import Watched, pack_layer

_PER_LAYER = 16
# Layers whose packed weights are kept, over all programs of the process.
_MAX_LAYERS = 48


@custom_op("dynplan::planned_encoder", mutates_args=(), device_types=("cpu", "cuda"))
def planned_encoder(
    hidden: Tensor,
    attention_mask: Tensor | None,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    num_heads: int,
    activation: str,
    eps: float,
    dtype: str | None,
    reads_first: bool,
) -> Tensor:
    """Padded states after the last layer, every sample along its own path. Inference only: no gradient.

    Args:
        hidden: (B, S, H) floating, embeddings.
        attention_mask: (B, S) bool or integer, 1 (token) or 0 (padding), any pattern; None: all are tokens.
        keep: (B, L) bool, the plan; None: every layer for every sample.
        weights: 16 L tensors of one floating dtype: for each layer weight (N, K) and bias (N,) of query, key,
            value, output, first norm, up, down, second norm.
        num_heads, activation, eps: as for :func:`~dynplan.ops.conditional_encoder`.
        dtype: "int8" or "bfloat16": of :func:`~dynplan.ops.pack_reduced_encoder_weights`; None: the weights'.
        reads_first: whether position 0 is going to be read: then it has to be a token in every sample that
            has one.

    Returns:
        (B, S, H), dtype of ``hidden``, zeros at padding.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; a mask entry other than 0 and 1.
        NotImplementedError: padding that ``reads_first`` forbids.
    """
    batch_size, length = hidden.shape[:2]
    layers = [weights[at : at + _PER_LAYER] for at in range(0, len(weights), _PER_LAYER)]
    with torch.no_grad():
        if attention_mask is not None and reads_first:
            check_first(attention_mask)
        packed_weights = _kept(layers, dtype)
        rows, indices, offsets = pack_padded(hidden, attention_mask)
        if packed_weights[0].is_floating_point():
            rows = rows.to(packed_weights[0].dtype)
        elif rows.dtype == torch.float16:
            rows = rows.float()
        if keep is None:
            keep = torch.ones(batch_size, len(layers), dtype=torch.bool, device=hidden.device)
        dispatch = build_dispatch(keep, offsets, rows.shape[0])
        done = conditional_encoder(
            rows, dispatch, None, num_heads, activation, eps, packed_weights=packed_weights
        )
        done = done.to(hidden.dtype)
        return done.view_as(hidden) if indices is None else unpack(done, indices, batch_size, length)


def pack_padded(hidden: Tensor, attention_mask: Tensor | None) -> Packed:
    """:func:`~dynplan.ops.pack`; without a mask all ``B * S`` rows as they lie, and no indices."""
    if attention_mask is not None:
        return pack(hidden, attention_mask)
    batch_size, length = hidden.shape[:2]
    steps = torch.arange(batch_size + 1, dtype=torch.int32, device=hidden.device)
    return Packed(hidden.flatten(0, 1), None, steps * length)


def offsets_of(attention_mask: Tensor) -> Tensor:
    """int32 ``(B + 1,)``: where each sample's tokens begin among those of all, from a mask ``(B, S)``."""
    offsets = attention_mask.new_zeros(attention_mask.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = (attention_mask != 0).sum(1).cumsum(0)
    return offsets


def check_first(mask: Tensor) -> None:
    """The first position is read as a sample's summary; packed, there is nothing there but tokens."""
    first = mask.select(1, 0) if mask.shape[1] else mask.any(1)
    if mask.device.type != "cpu":
        torch._assert_async((first.bool() | ~mask.any(1)).all())
    elif not first.all():
        wrong = (~first.bool() & mask.any(1)).nonzero().flatten()
        if wrong.numel():
            raise NotImplementedError(
                "dynplan: expected attention_mask to keep the first token of every sample, since this "
                f"model reads its summary there, got padding in sample {int(wrong[0])}; pad on the right"
            )


# By address: a compiled graph may hand the same weights over as other objects. The tensors are held with what
# was packed of them, so that no other ones can come to lie where they do.
_cache: OrderedDict[tuple, tuple[Watched, list[Tensor]]] = OrderedDict()
_turn = threading.Lock()


def _kept(layers: list[list[Tensor]], dtype: str | None) -> list[Tensor]:
    """Packed weights of these tensors, kept; those that were asked for longest ago go."""
    tensors = [tensor for layer in layers for tensor in layer]
    key = (dtype, *((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors))
    with _turn:
        entry = _cache.pop(key, None)
        if entry is None or not entry[0].unchanged():
            # Before packing: what another thread writes meanwhile shall be seen.
            entry = Watched(tensors), [pack_layer(layer, dtype) for layer in layers]
        _cache[key] = entry
        while len(_cache) > 1 and sum(map(len, _cache)) > _PER_LAYER * _MAX_LAYERS:
            _cache.popitem(last=False)
    return entry[1]


@planned_encoder.register_fake
def _planned_encoder_fake(
    hidden, attention_mask, keep, weights, num_heads, activation, eps, dtype, reads_first
) -> Tensor:
    torch._check_value(
        hidden.dim() == 3,
        lambda: f"planned_encoder: expected hidden to have shape (B, S, H), got {list(hidden.shape)}",
    )
    torch._check_value(
        bool(weights) and len(weights) % _PER_LAYER == 0,
        lambda: f"planned_encoder: expected {_PER_LAYER} weights a layer, got {len(weights)}",
    )
    check_options("planned_encoder", hidden.shape[2], num_heads, activation)
    return hidden.new_empty(hidden.shape)
