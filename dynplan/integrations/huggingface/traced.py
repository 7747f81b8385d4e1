"""The forward while PyTorch records it: ``torch.compile``, ``torch.export``, ``torch.jit.trace``.

A compiled graph stays in the process of its model. So inference is one opaque op that finds the live model by
a handle and runs its forward: whatever is changed about the model or its policy later is seen as ever, and
nothing is compiled again. With gradients the layers' own modules are traced, and only the plan is opaque.

An exported or traced program leaves the model behind. It holds the policy of that moment as part of the
graph, and the encoder as :func:`~dynplan.ops.planned_encoder.planned_encoder` on weights of its own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch.library import custom_op
from transformers.masking_utils import create_bidirectional_mask

from dynplan.integrations.huggingface.arguments import check_mask
from dynplan.integrations.huggingface.encoder_state import (
    GRADIENTS,
    READS_PADDING,
    EncoderState,
    layer_tensors,
)
from dynplan.ops.planned_encoder import check_first, offsets_of, pack_padded, planned_encoder
from dynplan.plans import check_budget_is_heard, decide, plan_upfront
from dynplan.policies import FixedPath, HashPath, KeepAll, PlannerPolicy, StaticPath
from dynplan.snapshot import own_forward

if TYPE_CHECKING:
    from dynplan.integrations.huggingface.forward import SwappedForward

_Inputs = tuple[Tensor | None, ...]
_States = tuple[Tensor, tuple[Tensor, ...] | None]

# Policies that are a function of the batch, so that a graph can hold them.
_RECORDED = (KeepAll, FixedPath, StaticPath, HashPath, PlannerPolicy)

_live: weakref.WeakValueDictionary[str, SwappedForward] = weakref.WeakValueDictionary()
_handles = itertools.count()


def register(forward: SwappedForward) -> str:
    """A handle by which ops find ``forward`` for as long as it lives."""
    handle = str(next(_handles))  # Dynamo may take an attribute that is an int for a variable
    _live[handle] = forward
    return handle


def is_tracing() -> bool:
    """Whether the forward is being compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def run(forward: SwappedForward, inputs: _Inputs, collect: bool) -> _States:
    """As ``forward.run``, for the graph that is being recorded.

    Raises:
        NotImplementedError: a graph that could not be right, with the way out.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return _record(forward, inputs, collect)
    if torch.is_grad_enabled():
        if _why_not_loop(forward.handle) is not None:
            return _leave(forward.handle, inputs, collect)
        hidden, _, mask = forward.embed(None, inputs, True, "traced")
        return _differentiable(forward, hidden, inputs, mask, collect)
    states = len(forward.controller.layers) + 1 if collect else 1
    *before, last = swapped_forward(forward.handle, *inputs, states, _autocast_dtype(inputs))
    return last, (*before, last) if collect else None


# --- inference, compiled ---


@custom_op("dynplan::swapped_forward", mutates_args=())
def swapped_forward(
    handle: str,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    states: int,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """The forward of a live model, without gradients.

    Args:
        handle: of the model's forward.
        states: 1 for the last states alone, ``L + 1`` for all.
        autocast: of the surroundings; a compiled graph runs without.

    Returns:
        ``states`` tensors ``(B, S, H)``, the last states last.
    """
    forward = _live[handle]
    inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    with torch.no_grad(), _autocast(inputs, autocast):
        last, between = forward.run(inputs, states > 1)
    dtype = _dtype_of(forward, autocast)
    # A bypassed state is the one before it, and outputs of an op must not share memory.
    return [*(state.to(dtype, copy=True) for state in (between or ())[:-1]), last.to(dtype)]


@swapped_forward.register_fake
def _swapped_forward_fake(
    handle, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, states, autocast
) -> list[Tensor]:
    forward = _live[handle]
    given = inputs_embeds if input_ids is None else input_ids
    shape = (*given.shape[:2], forward.model.config.hidden_size)
    return [given.new_empty(shape, dtype=_dtype_of(forward, autocast)) for _ in range(states)]


def _dtype_of(forward: SwappedForward, autocast: torch.dtype | None) -> torch.dtype:
    """Of the hidden states: the embeddings' own; a projection after them is a product."""
    dtype = forward.model.dtype
    projected = forward.model._modules.get(forward.family.projection) is not None
    return autocast if autocast is not None and projected and dtype != torch.float64 else dtype


def _autocast_dtype(inputs: _Inputs) -> torch.dtype | None:
    kind = next(tensor for tensor in inputs if tensor is not None).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _autocast(inputs: _Inputs, dtype: torch.dtype | None) -> AbstractContextManager:
    kind = next(tensor for tensor in inputs if tensor is not None).device.type
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


# --- gradients, compiled ---


def _differentiable(
    forward: SwappedForward, hidden: Tensor, inputs: _Inputs, mask: Tensor | None, collect: bool
) -> _States:
    input_ids, given = inputs[:2]
    plan = hidden.new_zeros((hidden.shape[0], len(forward.controller.layers)), dtype=torch.bool)

    def keep(layer: int, hidden: Tensor) -> Tensor:
        nonlocal plan
        at = (layer, hidden.detach(), given, input_ids, plan, _autocast_dtype(inputs))
        plan = swapped_plan(forward.handle, *at)
        return plan[:, layer]

    return _padded(forward, hidden, mask, keep, collect)


@custom_op("dynplan::swapped_plan", mutates_args=())
def swapped_plan(
    handle: str,
    layer: int,
    hidden: Tensor,
    attention_mask: Tensor | None,
    input_ids: Tensor | None,
    plan: Tensor,
    autocast: torch.dtype | None,
) -> Tensor:
    """The plan so far, and whatever a live model's policy adds to it before ``layer``.

    Args:
        handle: of the model's forward.
        layer: 0-based; at 0 an upfront policy decides everything.
        hidden: ``(B, S, H)``, states about to enter the layer.
        plan: bool ``(B, L)``, decisions so far.
        autocast: of the surroundings.

    Returns:
        bool ``(B, L)``.
    """
    forward = _live[handle]
    controller = forward.controller
    policy = controller.policy
    plan = plan.clone()
    if layer == 0:
        _begin(forward, attention_mask)
    elif not policy.stepwise:
        return plan
    if attention_mask is not None:
        attention_mask = check_mask(attention_mask, *hidden.shape[:2])
    rows, _, offsets = pack_padded(hidden, attention_mask)
    request = controller.request(*plan.shape, rows, offsets, input_ids, attention_mask)
    with torch.no_grad(), _autocast((hidden,), autocast):
        if not policy.stepwise:
            plan.copy_(plan_upfront(policy, request))
        elif layer in policy.asks(request):
            decide(policy, layer, request, rows, plan)
    controller.note(plan.clone(), GRADIENTS)
    return plan


@swapped_plan.register_fake
def _swapped_plan_fake(handle, layer, hidden, attention_mask, input_ids, plan, autocast) -> Tensor:
    return torch.empty_like(plan)


def _begin(forward: SwappedForward, attention_mask: Tensor | None) -> None:
    """What a forward asks before its first layer."""
    controller = forward.controller
    refused = controller.state().why_refused
    if controller.take_gates() is not None:
        refused = "gates cannot be set for a compiled model with gradients: call the model itself"
    if controller.policy.reads_answers:
        refused = "exits cannot answer in a compiled model with gradients: call the model itself"
    if refused is not None:
        raise NotImplementedError(f"dynplan: {refused}")
    if attention_mask is not None and forward.reads_first:
        check_first(attention_mask)
    controller.tell(GRADIENTS, warn=True)
    controller.refresh()  # an optimizer step usually follows, and some keep no record


# Policies may draw, and last_plan is of the latest: neither dropped, nor merged, nor out of order.
for _op in (swapped_forward, swapped_plan):
    _op.register_effect(EffectType.ORDERED)


@torch._dynamo.assume_constant_result
def _why_not_loop(handle: str) -> str | None:
    """Why our loop over the layers cannot stand for the stack's own."""
    forward = _live[handle]
    name, suffix = forward.family.stack
    own = own_forward(getattr(forward.model, name), forward.family.named(suffix))
    return None if own else f"{forward.family.prefix}{suffix} has hooks or a forward of its own"


@torch.compiler.disable(reason="dynplan: the module that runs the layers has hooks or a forward of its own")
def _leave(handle: str, inputs: _Inputs, collect: bool) -> _States:
    return _live[handle].run(inputs, collect)


# --- programs that leave the model behind ---


def _record(forward: SwappedForward, inputs: _Inputs, collect: bool) -> _States:
    why_not, why_not_fused, *reading = _read(forward.handle)
    if why_not is not None:
        raise NotImplementedError(f"dynplan: {why_not}")
    hidden, _, mask = forward.embed(None, inputs, True, "traced")
    keep = _recorded_plan(forward, hidden, inputs[0], mask)
    weights = forward.controller.weights
    if forward.reads == "all" and inputs[1] is not None:
        why_not_fused = READS_PADDING
    if why_not_fused is not None:
        if weights is not None:
            raise NotImplementedError(f"dynplan: weights={weights!r} cannot be exported: {why_not_fused}")

        def taken(layer: int, hidden: Tensor) -> Tensor | None:
            return None if keep is None else keep[:, layer]

        return _padded(forward, hidden, mask, taken, collect)
    layers = [layer_tensors(layer, forward.family.parts) for layer in forward.controller.layers]
    options = (*reading, weights, forward.reads_first)
    if not collect:
        flat = [tensor for layer in layers for tensor in layer]
        return planned_encoder(hidden, mask, keep, flat, *options), None
    states = [hidden]
    for index, layer in enumerate(layers):
        one = None if keep is None else keep[:, index : index + 1]
        states.append(planned_encoder(states[-1], mask, one, list(layer), *options))
    return states[-1], tuple(states)


@torch._dynamo.assume_constant_result
def _read(handle: str) -> tuple:
    """Why no program at all, why not the kernels, and how the kernels read the layers."""
    forward = _live[handle]
    why_not = _why_not_loop(handle)
    if why_not is not None:
        why_not += ", which a program cannot hold; call dynplan.unswap(model)"
    if torch.onnx.is_in_onnx_export():  # Dynamo takes it for False
        why_not = (
            "ONNX has no op for per-sample paths; dynplan.export_onnx(model, path, keep) exports the "
            "original with the layers of one path"
        )
    state = EncoderState(forward.model, forward.family, None, traced=True)
    reading = state.reading
    numbers = (0, "", 0.0) if reading is None else (reading.num_heads, reading.activation, reading.eps)
    return why_not, state.why_not_fused, *numbers


def _recorded_plan(
    forward: SwappedForward, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """The policy as part of the graph; None: every layer for every sample."""
    controller = forward.controller
    policy = controller.policy
    if type(policy) not in _RECORDED or policy.stepwise:
        names = ", ".join(kind.__name__ for kind in _RECORDED)
        raise NotImplementedError(
            f"dynplan: expected a policy that a program can hold ({names}; no stepwise planner), got "
            f"{type(policy).__name__}; set model.dynplan.policy to one of these, or use torch.compile"
        )
    if type(policy) is PlannerPolicy and (torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing()):
        raise NotImplementedError(
            "dynplan: expected torch.export with strict=False for a planner, which is no module of the "
            "model, got " + ("torch.jit.trace" if torch.jit.is_tracing() else "strict=True")
        )
    if controller.gates is not None:
        raise NotImplementedError("dynplan: expected no gates while a program is recorded, got some")
    batch_size, length = hidden.shape[:2]
    rows, _, offsets = pack_padded(hidden, None)
    if mask is not None:
        # As on a GPU: tokens first, what is beyond the last offset holds nothing.
        padding = (mask == 0).flatten()
        rows = rows[padding.to(torch.int8).argsort(stable=True)]
        offsets = offsets_of(mask)
    layers = len(controller.layers)
    request = controller.request(batch_size, layers, rows, offsets, input_ids, mask)
    check_budget_is_heard(policy, request)
    return None if type(policy) is KeepAll else policy.plan(request)


# --- both ---


def _padded(
    forward: SwappedForward,
    hidden: Tensor,
    mask: Tensor | None,
    keep: Callable[[int, Tensor], Tensor | None],
    collect: bool,
) -> _States:
    """All layers' own modules on padded states, as :func:`~.eager.run_padded` calls them."""
    states = [hidden]
    bias = create_bidirectional_mask(forward.model.config, hidden, mask)
    for index, layer in enumerate(forward.controller.layers):
        before = states[-1]
        taken = keep(index, before)
        after = layer(before, bias)
        after = after[0] if isinstance(after, tuple) else after
        states.append(after if taken is None else torch.where(taken.view(-1, 1, 1), after, before))
    return states[-1], tuple(states) if collect else None
