"""The planned encoder: a stack of Hugging Face layers run on packed rows, each sample along its own path.

Two ways through, one meaning. Without gradients the ops do the work. With gradients or dropout the layers'
own submodules are called on the packed active rows, so that whatever hangs on them (adapters, hooks, dropout)
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.integrations.weights import PackedLayers
from dynplan.ops.build_dispatch import build_dispatch
from dynplan.ops.conditional_encoder_layer import (
    attend_packed,
    conditional_encoder,
    conditional_encoder_layer,
)
from dynplan.policies import PlanRequest, Policy

Gates = Tensor | Callable[..., Tensor]

# What the ops take, by the type of the device.
FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(slots=True)
class EncoderRun:
    """What one forward left behind.

    Attributes:
        hidden: packed states after the last layer, ``(T, H)``.
        plan: bool ``(B, L)``, what was done.
        states: packed states before each layer and after the last, where they were asked for.
    """

    hidden: Tensor
    plan: Tensor
    states: list[Tensor] | None


class PlannedEncoder:
    """Runs a stack of layers under a policy.

    Args:
        layers: post-norm encoder layers with Hugging Face BERT's submodules.
        num_heads: attention heads.
        activation: of the feed-forward, by its Hugging Face name.
        eps: of both norms.
    """

    def __init__(self, layers: nn.ModuleList, num_heads: int, activation: str, eps: float) -> None:
        self.layers = layers
        self.shape = (num_heads, activation, eps)
        self._weights = PackedLayers()

    def run(self, request: PlanRequest, policy: Policy, gates: Gates | None, collect: bool) -> EncoderRun:
        """Run the whole stack on ``request.hidden``.

        Args:
            request: the batch.
            policy: decides the plan, unless ``gates`` do.
            gates: see :attr:`Controller.gates <dynplan.integrations.controller.Controller.gates>`.
            collect: keep the states between layers.
        """
        layers = list(self.layers)
        fused = request.hidden.dtype in FUSED_DTYPES.get(request.device.type, ())
        if gates is None and fused and not _learns(layers, request.hidden):
            packed = self.packed()
            if packed is not None:
                return self._run_fused(request, policy, packed, collect)
        return self._run_eager(request, policy, gates, collect)

    def refresh(self) -> None:
        """Pack the weights again at the next forward, for writes that PyTorch keeps no record of."""
        self._weights = PackedLayers()

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are a cache; copies and pickles make their own.
        return {"layers": self.layers, "shape": self.shape, "_weights": PackedLayers()}

    def packed(self) -> list[Tensor] | None:
        """Each layer's weights as the kernels read them; None where only the layers' own modules will do."""
        return self._weights.get(list(self.layers))

    def _run_fused(
        self, request: PlanRequest, policy: Policy, packed: list[Tensor], collect: bool
    ) -> EncoderRun:
        hidden, offsets, capacity = request.hidden, request.cu_seqlens, request.hidden.shape[0]
        num_heads, activation, eps = self.shape
        states = [hidden] if collect else None
        if policy.stepwise:
            plan = torch.zeros(request.batch_size, request.num_layers, dtype=torch.bool, device=hidden.device)
        else:
            plan = plan_upfront(policy, request)
            dispatch = build_dispatch(plan, offsets, capacity)
            if not collect:
                hidden = conditional_encoder(
                    hidden, dispatch, None, num_heads, activation, eps, packed_weights=packed
                )
                return EncoderRun(hidden, plan, None)
        for index, weights in enumerate(packed):
            if policy.stepwise:
                keep = keep_stepwise(policy, index, request, hidden, plan)
                plan[:, index] = keep
                step = build_dispatch(keep, offsets, capacity)
            else:
                step = dispatch.layer(index)
            hidden = conditional_encoder_layer(
                hidden, step, None, num_heads, activation, eps, packed_weights=weights
            )
            if collect:
                states.append(hidden)
        return EncoderRun(hidden, plan, states)

    def _run_eager(
        self, request: PlanRequest, policy: Policy, gates: Gates | None, collect: bool
    ) -> EncoderRun:
        if torch.is_grad_enabled():
            self.refresh()  # an optimizer step usually follows, and some write through parameter.data
        hidden = request.hidden
        shape = (request.batch_size, request.num_layers)
        decide = _Decisions(request, policy, gates)
        samples = torch.arange(request.batch_size, device=hidden.device)
        samples = samples.repeat_interleave(request.cu_seqlens.diff())
        plan = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
        states = [hidden] if collect else None
        for index, layer in enumerate(self.layers):
            keep, gate = decide(index, hidden, plan)
            plan[:, index] = keep
            # A gate with a gradient needs to know what the layer would have done to the samples it closes.
            take = torch.ones_like(keep) if gate is not None and gate.requires_grad else keep
            hidden = _bypass(layer, hidden, request.cu_seqlens, samples, take, gate)
            if collect:
                states.append(hidden)
        return EncoderRun(hidden, plan, states)


def _learns(layers: list[nn.Module], hidden: Tensor) -> bool:
    """Whether this forward needs gradients or dropout."""
    if any(layer.training for layer in layers):
        return True
    if not torch.is_grad_enabled():
        return False
    return hidden.requires_grad or any(p.requires_grad for layer in layers for p in layer.parameters())


class _Decisions:
    """Who is kept by a layer, and with which gate, wherever the decision comes from."""

    def __init__(self, request: PlanRequest, policy: Policy, gates: Gates | None) -> None:
        self.request = request
        self.policy = policy
        self.stepwise = None
        self.gates = None
        self.plan = None
        if gates is None:
            if not policy.stepwise:
                self.plan = plan_upfront(policy, request)
        elif callable(gates) and getattr(gates, "stepwise", False):
            self.stepwise = gates
        else:
            self.gates = check_gates(gates(request) if callable(gates) else gates, request)

    def __call__(self, layer: int, hidden: Tensor, plan: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.plan is not None:
            return self.plan[:, layer], None
        if self.gates is not None:
            gate = self.gates[:, layer]
        elif self.stepwise is not None:
            gate = check_gates(self.stepwise(layer, self.request, hidden), self.request, steps=True)
        else:
            return keep_stepwise(self.policy, layer, self.request, hidden, plan), None
        # Rounded for last_plan; what is computed is every sample whose gate is open at all.
        return gate.detach() != 0, gate


def plan_upfront(policy: Policy, request: PlanRequest) -> Tensor:
    """The policy's plan, checked."""
    _check_budget_is_heard(policy, request)
    with torch.no_grad():
        plan = policy.plan(request)
    _check_decision(policy, "plan", plan, (request.batch_size, request.num_layers), request.device)
    return plan


def keep_stepwise(policy: Policy, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
    """The policy's decision for one layer, checked."""
    if layer == 0:
        _check_budget_is_heard(policy, request)
    with torch.no_grad():
        keep = policy.keep(layer, request, hidden, plan)
    _check_decision(policy, "keep", keep, (request.batch_size,), request.device)
    return keep


def check_gates(gates: Any, request: PlanRequest, steps: bool = False) -> Tensor:
    """Gates of the batch, checked."""
    shape = (request.batch_size,) if steps else (request.batch_size, request.num_layers)
    if not isinstance(gates, Tensor) or not gates.is_floating_point() or gates.shape != shape:
        got = (
            f"{gates.dtype} of shape {tuple(gates.shape)}"
            if isinstance(gates, Tensor)
            else type(gates).__name__
        )
        raise ValueError(f"dynplan: expected gates to be a float tensor of shape {shape}, got {got}")
    return gates


def _check_budget_is_heard(policy: Policy, request: PlanRequest) -> None:
    if request.budget is not None and request.budget < 1 and not policy.takes_budget:
        raise ValueError(
            f"dynplan: expected a policy that takes a budget at budget {request.budget}, "
            f"got {type(policy).__name__}; set model.dynplan.budget = None or another policy"
        )


def _check_decision(
    policy: Policy, method: str, value: Any, shape: tuple[int, ...], device: torch.device
) -> None:
    expected = f"a bool tensor of shape {shape} on {device}"
    if (
        not isinstance(value, Tensor)
        or value.dtype != torch.bool
        or value.shape != shape
        or value.device != device
    ):
        got = (
            f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(f"{type(policy).__name__}.{method}: expected {expected}, got {got}")


def _bypass(
    layer: nn.Module, hidden: Tensor, offsets: Tensor, samples: Tensor, take: Tensor, gate: Tensor | None
) -> Tensor:
    """``layer`` on the rows of the samples in ``take``, mixed by ``gate``; all other rows as they came.

    Args:
        hidden: ``(T, H)``.
        offsets: int32 ``(B + 1,)``.
        samples: ``(T,)``, the sample of each row.
        take: bool ``(B,)``.
        gate: float ``(B,)``.
    """
    dispatch = build_dispatch(take, offsets, hidden.shape[0])
    sequences, active = dispatch.counts.tolist()
    if not active:
        return hidden
    rows = dispatch.rows[:active]
    inside = hidden.index_select(0, rows)
    run = partial(_layer_forward, layer, offsets=dispatch.cu_seqlens[: sequences + 1])
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        outside = layer._gradient_checkpointing_func(run, inside)
    else:
        outside = run(inside)
    outside = outside.to(hidden.dtype)
    if gate is not None:
        share = gate[samples[rows]].unsqueeze(1).to(hidden.dtype)
        outside = share * outside + (1 - share) * inside
    return hidden.index_copy(0, rows.long(), outside)


def _layer_forward(layer: nn.Module, inside: Tensor, offsets: Tensor) -> Tensor:
    """One Hugging Face encoder layer on packed rows, by its own submodules; attention alone needs
    sequences."""
    attention = layer.attention.self
    parts = [part(inside) for part in (attention.query, attention.key, attention.value)]
    dropout = attention.dropout.p if attention.training else 0.0
    context = attend_packed(torch.cat(parts, 1), offsets, attention.num_attention_heads, dropout)
    attended = layer.attention.output(context, inside)
    return layer.output(layer.intermediate(attended), attended)
