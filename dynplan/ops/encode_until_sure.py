"""A whole forward with exits in one call: layers up to a depth, answers there, who goes on, and so forth.

What a :class:`~dynplan.policies.ConfidenceExit` and its like decide between calls of
:func:`~dynplan.ops.conditional_encoder`, decided between the layers. Answers are summed in another order than
PyTorch's, so that a sample within a rounding of the threshold may go the other way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.conditional_encoder_layer import check_options
from dynplan.ops.embed_tokens import check_inputs

_encode_until_sure = find_op("encode_until_sure")


class Rungs(NamedTuple):
    """Where samples may leave, and what decides it.

    Attributes:
        chain: the depths at which samples may leave, rising within ``1..L``; empty: nobody runs anything.
        exits: weight ``(H, H)`` and bias ``(H,)``, float32, for each of ``chain`` below ``L``.
        sureness: "confidence", "entropy", "learned", "error" or "patience": the policies' words.
        measures: float32; for "learned" weight ``(1, H)`` and bias of each of those exits; for "error" those
            of two linear maps of each; else none.
        temperatures: for "confidence" those of the exits.
        thresholds: sureness to leave with at the budgets ``0, 1/n, ..., 1``.
        budget: share of layer work, 0..1.
        stream: int64 ``(5,)``, counts of a stream's budget, written; None: the contract holds per batch.
        burst: of the stream.
        sway: how far the stream's level moves the budget that the threshold is taken at, as a share of it.
    """

    chain: Sequence[int]
    exits: Sequence[Tensor]
    sureness: str
    measures: Sequence[Tensor]
    temperatures: Sequence[float]
    thresholds: Sequence[float]
    budget: float
    stream: Tensor | None = None
    burst: float = 0.0
    sway: float = 0.0


def encode_until_sure(
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
    packed_weights: Sequence[Tensor],
    num_heads: int,
    activation: str,
    eps: float,
    reads_first: bool,
    rungs: Rungs,
    head: Sequence[Tensor],
    head_activation: str,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of every sample along the path that its answers decide. CPU and inference only.

    Args:
        input_ids, attention_mask, token_type_ids: as for :func:`~dynplan.ops.encode_tokens`.
        word, type, position, norm_weight, norm_bias, norm_eps, padding_idx: as there.
        packed_weights, num_heads, activation, eps, reads_first: as there.
        rungs: where samples may leave.
        head: float32 weight (N, K) and bias (N,) of the one or two linear maps that the model's own head
            consists of, from the state in first position to the answer.
        head_activation: between the two: "tanh", "gelu" or "relu"; "none" where there is one.

    Returns:
        ``(B, S, H)`` float32, zeros at padding, in first position of samples that left what the head shall
        read of them; the plan, bool ``(B, L)``.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options that do not fit.
        IndexError: an id or a position outside its table.
    """
    exits = (*rungs[:2], head, head_activation, *rungs[2:])
    return _encode_until_sure(
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
        packed_weights,
        num_heads,
        activation,
        eps,
        reads_first,
        *exits,
    )


@torch.library.register_fake("dynplan::encode_until_sure")
def _encode_until_sure_fake(input_ids, attention_mask, _, word, *rest) -> tuple[Tensor, Tensor]:
    position, padding_idx, packed_weights, num_heads, activation = rest[1], *rest[5:9]
    check_inputs("encode_until_sure", input_ids, attention_mask, word, position, padding_idx)
    check_options("encode_until_sure", word.shape[1], num_heads, activation)
    states = word.new_empty((*input_ids.shape, word.shape[1]))
    return states, input_ids.new_empty((input_ids.shape[0], len(packed_weights)), dtype=torch.bool)
