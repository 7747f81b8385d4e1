"""The planned encoder: a stack of Hugging Face layers run on packed rows, each sample along its own path.

Two ways through, one meaning. Without gradients the ops do the work. With gradients or dropout the layers'
own submodules are called on the packed active rows, so that whatever hangs on them (adapters, hooks, dropout)
counts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynplan.integrations.weights import PackedLayers, PackedStack
from dynplan.ops.build_dispatch import Dispatch, build_dispatch
from dynplan.ops.conditional_encoder_layer import (
    ActiveSizes,
    active_sizes,
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
        weights: "int8" or "bfloat16": run every forward on such copies of the weights, or refuse it; None: on
            the weights as they are.
    """

    def __init__(
        self, layers: nn.ModuleList, num_heads: int, activation: str, eps: float, weights: str | None = None
    ) -> None:
        self.layers = layers
        self.shape = (num_heads, activation, eps)
        self._weights = PackedLayers(weights)

    @property
    def stack(self) -> PackedStack | None:
        """What the last forward that ran fused has packed; None before the first, or if none can."""
        stack = self._weights.stack
        return None if stack is None or stack.packed is None else stack

    @property
    def weights(self) -> str | None:
        """The type of the weights that products run on; None: the model's own."""
        return self._weights.dtype

    def run(self, request: PlanRequest, policy: Policy, gates: Gates | None, collect: bool) -> EncoderRun:
        """Run the whole stack on ``request.hidden``.

        Args:
            request: the batch.
            policy: decides the plan, unless ``gates`` do.
            gates: see :attr:`Controller.gates <dynplan.integrations.controller.Controller.gates>`.
            collect: keep the states between layers.

        Raises:
            RuntimeError: the forward wants more than the weights that were chosen can give.
        """
        layers = list(self.layers)
        fused = request.hidden.dtype in FUSED_DTYPES.get(request.device.type, ())
        if self.weights is not None:
            fused &= request.device.type == "cpu"
        if gates is None and fused and not _learns(layers, request.hidden):
            packed = self.packed()
            if packed is not None:
                return self._run_fused(request, policy, packed, collect)
        if self.weights is not None:
            raise self._refusal(layers, request, gates)
        return self._run_eager(request, policy, gates, collect)

    def refresh(self) -> None:
        """Pack the weights again at the next forward, for writes that PyTorch keeps no record of."""
        self._weights = PackedLayers(self.weights)

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are a cache; copies and pickles make their own.
        return {"layers": self.layers, "shape": self.shape, "_weights": PackedLayers(self.weights)}

    def packed(self) -> list[Tensor] | None:
        """Each layer's weights as the kernels read them; None where only the layers' own modules will do."""
        return self._weights.get(list(self.layers))

    def _refusal(self, layers: list[nn.Module], request: PlanRequest, gates: Gates | None) -> RuntimeError:
        """Why a forward cannot run on the chosen weights; on the model's own it would give something else."""
        if request.device.type != "cpu":
            problem = f"a model on cpu, got one on {request.device}"
        elif request.hidden.dtype not in FUSED_DTYPES["cpu"]:
            problem = f"a model in float32 or bfloat16, got {request.hidden.dtype}"
        elif gates is not None:
            problem = "no gates, got some"
        elif _learns(layers, request.hidden):
            problem = "inference (model.eval() and torch.no_grad()), got training mode or gradients"
        else:
            problem = "plain linear modules and norms, got adapters, hooks or others"
        return RuntimeError(
            f"dynplan: expected {problem}; the model was swapped with weights={self.weights!r}: "
            "call dynplan.unswap(model), then dynplan.swap(model) without weights="
        )

    def _run_fused(
        self, request: PlanRequest, policy: Policy, packed: list[Tensor], collect: bool
    ) -> EncoderRun:
        hidden, offsets, capacity = request.hidden, request.cu_seqlens, request.hidden.shape[0]
        num_heads, activation, eps = self.shape
        came = hidden.dtype
        if packed and packed[0].is_floating_point():
            hidden = hidden.to(packed[0].dtype)  # autocast leaves embeddings in float32 whatever the weights
        states = [request.hidden] if collect else None
        if policy.stepwise:
            plan = torch.zeros(request.batch_size, request.num_layers, dtype=torch.bool, device=hidden.device)
        else:
            plan = plan_upfront(policy, request)
            dispatch = build_dispatch(plan, offsets, capacity)
            if not collect:
                hidden = conditional_encoder(
                    hidden, dispatch, None, num_heads, activation, eps, packed_weights=packed
                )
                return EncoderRun(hidden if hidden.dtype == came else hidden.to(came), plan, None)
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
                states.append(hidden.to(came))
        return EncoderRun(hidden.to(came), plan, states)

    def _run_eager(
        self, request: PlanRequest, policy: Policy, gates: Gates | None, collect: bool
    ) -> EncoderRun:
        if torch.is_grad_enabled():
            self.refresh()  # an optimizer step usually follows, and some write through parameter.data
        hidden, offsets, capacity = request.hidden, request.cu_seqlens, request.hidden.shape[0]
        shape = (request.batch_size, request.num_layers)
        decide = _Decisions(request, policy, gates)
        taken = decide.ahead()
        # Shapes depend on the sizes, which the host reads back: once where it can, else once a layer.
        steps = None if taken is None else _Step.of_all(build_dispatch(taken, offsets, capacity))
        plan = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
        states = [hidden] if collect else None
        for index, layer in enumerate(self.layers):
            keep, gate = decide(index, hidden, plan)
            plan[:, index] = keep
            step = steps[index] if steps else _Step.of(build_dispatch(_taken(keep, gate), offsets, capacity))
            share = None if gate is None else gate.index_select(0, _samples_of(step.rows, offsets))
            hidden = _bypass(layer, hidden, step, share)
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

    def ahead(self) -> Tensor | None:
        """Who is taken by which layer, bool ``(B, L)``, where that is known before the first one."""
        if self.gates is not None:
            return _taken(self.gates.detach() != 0, self.gates)
        return self.plan

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
    with _no_grad():
        plan = policy.plan(request)
    _check_decision(policy, "plan", plan, (request.batch_size, request.num_layers), request.device)
    return plan


def keep_stepwise(policy: Policy, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
    """The policy's decision for one layer, checked."""
    if layer == 0:
        _check_budget_is_heard(policy, request)
    with _no_grad():
        keep = policy.keep(layer, request, hidden, plan)
    _check_decision(policy, "keep", keep, (request.batch_size,), request.device)
    return keep


def _no_grad() -> AbstractContextManager:
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING  # no_grad takes microseconds


_NOTHING = nullcontext()


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
        raise ValueError(
            f"{type(policy).__name__}.{method}: expected a bool tensor of shape {shape} on {device}, "
            f"got {got}"
        )


def _taken(keep: Tensor, gate: Tensor | None) -> Tensor:
    """Who is computed: a gate with a gradient needs to know what the layer would have done to those it
    closes."""
    return torch.ones_like(keep) if gate is not None and gate.requires_grad else keep


class _Step(NamedTuple):
    """One layer's dispatch, with the sizes that the host needs.

    Attributes:
        rows: ``(N,)``, the active rows.
        cu_seqlens: of the active samples.
        sizes: of both.
    """

    rows: Tensor
    cu_seqlens: Tensor
    sizes: ActiveSizes

    @classmethod
    def of(cls, dispatch: Dispatch) -> _Step:
        sizes = active_sizes(dispatch.cu_seqlens.tolist())
        return cls(dispatch.rows[: sizes.rows], dispatch.cu_seqlens, sizes)

    @classmethod
    def of_all(cls, dispatch: Dispatch) -> list[_Step]:
        sizes = [active_sizes(offsets) for offsets in dispatch.cu_seqlens.tolist()]
        return [
            cls(dispatch.rows[layer, : of_layer.rows], dispatch.cu_seqlens[layer], of_layer)
            for layer, of_layer in enumerate(sizes)
        ]


def _samples_of(rows: Tensor, offsets: Tensor) -> Tensor:
    """The sample of each packed row."""
    return torch.searchsorted(offsets[1:], rows, right=True)


def _bypass(layer: nn.Module, hidden: Tensor, step: _Step, share: Tensor | None) -> Tensor:
    """``layer`` on the active rows, mixed by ``share`` ``(N,)``; all other rows as they came."""
    if not step.sizes.rows:
        return hidden
    inside = hidden.index_select(0, step.rows)
    run = partial(_layer_forward, layer, step=step)
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        outside = layer._gradient_checkpointing_func(run, inside)
    else:
        outside = run(inside)
    outside = outside.to(hidden.dtype)
    if share is not None:
        share = share.unsqueeze(1).to(hidden.dtype)
        outside = share * outside + (1 - share) * inside
    return hidden.index_copy(0, step.rows.long(), outside)


def _layer_forward(layer: nn.Module, inside: Tensor, step: _Step) -> Tensor:
    """One Hugging Face encoder layer on packed rows, by its own submodules; attention alone needs
    sequences."""
    attention = layer.attention.self
    parts = [part(inside) for part in (attention.query, attention.key, attention.value)]
    dropout = attention.dropout.p if attention.training else 0.0
    heads = attention.num_attention_heads
    context = attend_packed(torch.cat(parts, 1), step.cu_seqlens, step.sizes, heads, dropout)
    attended = layer.attention.output(context, inside)
    return layer.output(layer.intermediate(attended), attended)
