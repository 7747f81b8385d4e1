"""A swapped encoder's forward in one op, where nothing stands in its way.

One short text leaves no more than its weights in the caches, and whatever is looked at between two forwards
is waited for. So what may not have changed is asked for as a whole (``EncoderState.holds``), and what remains
of the forward is one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynplan.integrations.huggingface.controller import Controller
from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.ops.encode_tokens import encode_tokens
from dynplan.ops.encode_until_sure import Rungs, encode_until_sure
from dynplan.ops.planned_encoder import offsets_of
from dynplan.plans import plan_upfront
from dynplan.policies import ConfidenceExit, KeepAll, PlanRequest
from dynplan.stream_budget import StreamBudget


def run_fast(
    state: EncoderState,
    controller: Controller,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    reads_first: bool,
) -> tuple[Tensor, Tensor | tuple[int, int]] | None:
    """Last hidden states ``(B, S, H)`` and the plan, or the plan's shape where every layer is kept.

    Args:
        state: of an encoder whose layers and embeddings the kernels can stand for.
        controller: its policy and budget decide the plan.
        input_ids, attention_mask, token_type_ids: see the original model's forward.
        reads_first: whether the state at position 0 is read.

    Returns:
        None where the way op by op has to be taken, or to explain an error.
    """
    policy, budget = controller.policy, controller.budget
    exits = policy.reads_answers
    if (
        (policy.reads_hidden and not exits)
        or (isinstance(budget, StreamBudget) and not exits)
        or (policy.stepwise and not exits)
        or type(input_ids) is not Tensor
        or not input_ids.is_cpu
        or input_ids.dim() != 2
        or state.projection is not None
        or state.embeddings[0].dtype != torch.float32
        or (attention_mask is not None and not _is_mask(attention_mask, input_ids))
    ):
        return None
    inputs = (input_ids, attention_mask, token_type_ids)
    if exits:
        return _run_exits(state, controller, inputs, reads_first)
    keep = None
    if type(policy) is not KeepAll or budget is not None:
        keep = plan_upfront(policy, _RequestAhead(state, budget, input_ids, attention_mask))
    reading = state.reading
    try:
        hidden = encode_tokens(
            *inputs,
            *state.embeddings,
            keep,
            state.packed(),
            reading.num_heads,
            reading.activation,
            reading.eps,
            reads_first,
        )
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    return hidden, (input_ids.shape[0], len(state.layers)) if keep is None else keep


def _run_exits(
    state: EncoderState,
    controller: Controller,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    reads_first: bool,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`run_fast`, where samples leave at exits."""
    policy, reading = controller.policy, state.reading
    budget = controller.budget
    if not isinstance(policy, ConfidenceExit) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if isinstance(budget, StreamBudget) and type(budget) is not StreamBudget:
        return None  # one with rules of its own
    head = controller.head(policy.planner)
    if head.tensors is None:
        return None
    rungs = rungs_of(policy, _RequestAhead(state, budget, *inputs[:2]))
    if rungs is None:
        return None
    options = (reading.num_heads, reading.activation, reading.eps, reads_first)
    try:
        return encode_until_sure(
            *inputs, *state.embeddings, state.packed(), *options, rungs, head.tensors, head.activation
        )
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


def rungs_of(policy: ConfidenceExit, request: PlanRequest) -> Rungs | None:
    """What the policy would decide, for native code."""
    return policy.rungs(request)


class _RequestAhead(PlanRequest):
    """A request before anything is embedded: without hidden states, and with offsets for those who ask."""

    __slots__ = ()

    def __init__(
        self,
        state: EncoderState,
        budget: float | StreamBudget | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
    ) -> None:
        stream = budget if isinstance(budget, StreamBudget) else None
        self.batch_size = input_ids.shape[0]
        self.num_layers = len(state.layers)
        self.hidden = _NOTHING
        self.budget = budget if stream is None else stream.share
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.stream, self.answer = stream, None
        self.memory = {}

    @property
    def cu_seqlens(self) -> Tensor:
        if self.attention_mask is None:
            return torch.arange(self.batch_size + 1, dtype=torch.int32) * self.input_ids.shape[1]
        return offsets_of(self.attention_mask)


_NOTHING = torch.empty(0, 0)


def _is_mask(mask: Tensor, input_ids: Tensor) -> bool:
    return not mask.is_floating_point() and mask.is_cpu and mask.shape == input_ids.shape
