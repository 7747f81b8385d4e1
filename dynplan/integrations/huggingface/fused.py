"""The encoder by the kernels, op by op: packed rows, each sample along its own path, inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.ops.build_dispatch import build_dispatch
from dynplan.ops.conditional_encoder_layer import conditional_encoder
from dynplan.plans import decide, plan_upfront
from dynplan.policies import PlanRequest, Policy


def run_fused(
    state: EncoderState, request: PlanRequest, policy: Policy, collect: bool
) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Run all layers on ``request.hidden``.

    Args:
        state: of an encoder that the kernels can stand for.
        request: the batch.
        policy: decides the plan.
        collect: keep the states between layers.

    Returns:
        Packed states after the last layer, ``(T, H)`` in the dtype of ``request.hidden``; the plan, bool
        ``(B, L)``; packed states before each layer and after the last, where they were asked for.
    """
    hidden, offsets, capacity = request.hidden, request.cu_seqlens, request.hidden.shape[0]
    packed, reading, came = state.packed(), state.reading, hidden.dtype
    options = (reading.num_heads, reading.activation, reading.eps)
    if packed[0].is_floating_point():
        hidden = hidden.to(packed[0].dtype)  # autocast leaves embeddings in float32 whatever the weights
    elif hidden.dtype == torch.float16:
        hidden = hidden.float()
    states = [request.hidden] if collect else None
    layers = request.num_layers
    if policy.stepwise:
        plan = torch.zeros(request.batch_size, layers, dtype=torch.bool, device=hidden.device)
    else:
        plan = plan_upfront(policy, request)
    layer = 0
    while layer < layers:
        until = decide(policy, layer, request, hidden, plan) if policy.stepwise else layers
        steps = range(layer, until) if collect else (layer,)
        for first in steps:
            last = first + 1 if collect else until
            dispatch = build_dispatch(plan[:, first:last].contiguous(), offsets, capacity)
            hidden = conditional_encoder(hidden, dispatch, None, *options, packed_weights=packed[first:last])
            if collect:
                states.append(hidden.to(came))
        layer = until
    return hidden.to(came), plan, states
