"""Who is kept by which layer in one forward: the policy's answers, or gates, checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dynplan.policies import PlanRequest, Policy

Gates = Tensor | Callable[..., Tensor]


def plan_upfront(policy: Policy, request: PlanRequest) -> Tensor:
    """The policy's plan, checked."""
    check_budget_is_heard(policy, request)
    with _no_grad():
        plan = policy.plan(request)
    _check_decision(policy, "plan", plan, (request.batch_size, request.num_layers), request.device)
    return plan


def decide(policy: Policy, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> int:
    """Writes a stepwise policy's decision before ``layer`` into the plan, checked, for all layers until it is
    asked again.

    Returns:
        The next layer to ask before; ``L`` if there is none.
    """
    with _no_grad():
        asks = policy.asks(request)
        if layer == 0:
            check_budget_is_heard(policy, request)
        until = next((other for other in asks if other > layer), request.num_layers)
        keep = policy.keep(layer, request, hidden, plan)
    _check_decision(policy, "keep", keep, (request.batch_size,), request.device)
    plan[:, layer:until] = keep.unsqueeze(1)
    return until


class Decisions:
    """Who is kept by a layer, and with which gate, wherever the decision comes from.

    Args:
        request: the batch.
        policy: decides, unless ``gates`` do.
        gates: see :attr:`Controller.gates <dynplan.integrations.huggingface.controller.Controller.gates>`.

    Attributes:
        plan: bool ``(B, L)``, the decisions so far, all of them where they are made upfront.
    """

    def __init__(self, request: PlanRequest, policy: Policy, gates: Gates | None) -> None:
        self.request = request
        self.policy = policy
        self._ahead = True
        self._until = 0
        self._stepwise = self._gates = None
        if gates is None:
            self._ahead = not policy.stepwise
        elif callable(gates) and getattr(gates, "stepwise", False):
            self._stepwise, self._ahead = gates, False
        else:
            self._gates = _check_gates(gates(request) if callable(gates) else gates, request)
        if self._gates is not None:
            self.plan = self._gates.detach() != 0
        elif self._ahead:
            self.plan = plan_upfront(policy, request)
        else:
            shape = (request.batch_size, request.num_layers)
            self.plan = torch.zeros(shape, dtype=torch.bool, device=request.device)

    def taken(self) -> Tensor | None:
        """Who is computed by which layer, bool ``(B, L)``, where that is known before the first one."""
        return taken(self.plan, self._gates) if self._ahead else None

    def __call__(self, layer: int, hidden: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """bool ``(B,)`` and gates ``(B,)`` or None; ``hidden()`` gives the packed states before the layer."""
        if self._ahead:
            gate = None if self._gates is None else self._gates[:, layer]
            return self.plan[:, layer], gate
        if self._stepwise is None:
            if layer == self._until:
                self._until = decide(self.policy, layer, self.request, hidden(), self.plan)
            return self.plan[:, layer].clone(), None  # autograd keeps it, and the plan is written on
        gate = _check_gates(self._stepwise(layer, self.request, hidden()), self.request, steps=True)
        # Rounded for last_plan; what is computed is every sample whose gate is open at all.
        keep = gate.detach() != 0
        self.plan[:, layer] = keep
        return keep, gate


def taken(keep: Tensor, gate: Tensor | None) -> Tensor:
    """Who is computed: a gate with a gradient needs to know what the layer would have done to those it
    closes."""
    return torch.ones_like(keep) if gate is not None and gate.requires_grad else keep


def _no_grad() -> AbstractContextManager:
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING  # no_grad takes microseconds


_NOTHING = nullcontext()


def _check_gates(gates: Any, request: PlanRequest, steps: bool = False) -> Tensor:
    shape = (request.batch_size,) if steps else (request.batch_size, request.num_layers)
    if not isinstance(gates, Tensor) or not gates.is_floating_point() or gates.shape != shape:
        raise ValueError(
            f"dynplan: expected gates to be a float tensor of shape {shape}, got {_described(gates)}"
        )
    return gates


def check_budget_is_heard(policy: Policy, request: PlanRequest) -> None:
    """Raises where a budget is set that the policy knows nothing of."""
    if request.budget is not None and request.budget < 1 and not policy.takes_budget:
        raise ValueError(
            f"dynplan: expected a policy that takes a budget at budget {request.budget}, "
            f"got {type(policy).__name__}; set model.dynplan.budget = None or another policy"
        )


def _check_decision(
    policy: Policy, method: str, value: Any, shape: tuple[int, ...], device: torch.device
) -> None:
    fits = isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == shape
    if not fits or value.device != device:
        on = f" on {value.device}" if isinstance(value, Tensor) else ""
        raise ValueError(
            f"{type(policy).__name__}.{method}: expected a bool tensor of shape {shape} on {device}, "
            f"got {_described(value)}{on}"
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
