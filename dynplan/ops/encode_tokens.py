"""A whole planned forward in one call: embeddings, dispatch, encoder, padding restored.

What :func:`~dynplan.ops.embed_tokens`, :func:`~dynplan.ops.build_dispatch`,
:func:`~dynplan.ops.conditional_encoder` and :func:`~dynplan.ops.unpack` give one after another, to the bit.
For one short text each op that is called costs 20 to 50 us, because its weights have left nothing else in the
caches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.conditional_encoder_layer import check_options
from dynplan.ops.embed_tokens import check_inputs

_encode_tokens = find_op("encode_tokens")


def encode_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    type: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    padding_idx: int | None,
    keep: Tensor | None,
    packed_weights: Sequence[Tensor],
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    reads_first: bool = False,
) -> Tensor:
    """Last hidden states of every sample along its own path. CPU and inference only: no gradient.

    Args:
        input_ids: (B, S) int64 or int32, rows of ``word``.
        attention_mask: (B, S) bool or integer, 1 (token) or 0 (padding), any pattern; None: all are tokens.
        token_type_ids: (B, S) int64 or int32, rows of ``type``; None: its row 0.
        word, type, position: (V, H), (K, H), (P, H) float32.
        norm_weight, norm_bias: (H,) float32, of the embeddings' layer norm.
        norm_eps: of that norm.
        padding_idx: of RoBERTa's positions, see :func:`~dynplan.ops.embed_tokens`; None: columns.
        keep: (B, L) bool, the plan; None: every layer for every sample.
        packed_weights: L blobs of ``pack_encoder_weights`` or ``pack_reduced_encoder_weights``.
        num_heads, activation, eps: as for :func:`~dynplan.ops.conditional_encoder`.
        reads_first: whether position 0 is going to be read: then it has to be a token in every sample that
            has one.

    Returns:
        (B, S, H) float32, zeros at padding.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; a mask entry other than 0 and 1;
            padding that ``reads_first`` forbids.
        IndexError: an id or a position outside its table.
    """
    return _encode_tokens(
        input_ids,
        attention_mask,
        token_type_ids,
        word,
        type,
        position,
        norm_weight,
        norm_bias,
        norm_eps,
        padding_idx,
        keep,
        packed_weights,
        num_heads,
        activation,
        eps,
        reads_first,
    )


@torch.library.register_fake("dynplan::encode_tokens")
def _encode_tokens_fake(
    input_ids,
    attention_mask,
    token_type_ids,
    word,
    type,
    position,
    norm_weight,
    norm_bias,
    norm_eps,
    padding_idx,
    keep,
    packed_weights,
    num_heads,
    activation,
    eps,
    reads_first,
) -> Tensor:
    check_inputs("encode_tokens", input_ids, attention_mask, word, position, padding_idx)
    check_options("encode_tokens", word.shape[1], num_heads, activation)
    return word.new_empty((*input_ids.shape, word.shape[1]))
