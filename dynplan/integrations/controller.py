"""The controller: what ``model.dynplan`` is."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.integrations.encoder import EncoderRun, Gates, PlannedEncoder
from dynplan.policies import PlanRequest, Policy, check_budget


class _Noted:
    """The plan of a forward, made when it is asked for where its shape says it all."""

    __slots__ = ("plan",)

    def __init__(self, plan: Tensor | tuple[int, int]) -> None:
        self.plan = plan


class Controller:
    """Steers a swapped model between its forwards.

    It is a plain object, so neither it nor a planner it holds appears in the model's modules, parameters or
    ``state_dict``; deep copies and pickles of the model carry it along.

    Args:
        encoder: the layers and their shape.
        policy: decides the plans.
    """

    def __init__(self, encoder: PlannedEncoder, policy: Policy) -> None:
        self._encoder = encoder
        self._budget: float | None = None
        self._latest: _Noted | None = None
        self._local = threading.local()
        self.policy = policy

    @property
    def policy(self) -> Policy:
        """What decides the plan; may be set between forwards."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(
                f"dynplan: expected policy to be a dynplan.policies.Policy, got {type(policy).__name__}"
            )
        self._policy = policy

    @property
    def budget(self) -> float | None:
        """Share of layer work that each next batch may spend, 0..1; None: the policy's own budget."""
        return self._budget

    @budget.setter
    def budget(self, budget: float | None) -> None:
        self._budget = None if budget is None else check_budget("dynplan", budget)

    @property
    def encoder(self) -> PlannedEncoder:
        """The layers."""
        return self._encoder

    @property
    def planner(self) -> nn.Module | None:
        """The policy's planner, if it has one."""
        return getattr(self._policy, "planner", None)

    @property
    def num_layers(self) -> int:
        return len(self._encoder.layers)

    @property
    def weights(self) -> str | None:
        """What the encoder's products run on: "int8", "bfloat16", or None for the model's own weights."""
        return self._encoder.weights

    @property
    def last_plan(self) -> Tensor | None:
        """bool ``(B, L)`` of this thread's last forward; a thread that ran none sees the latest of any."""
        noted = getattr(self._local, "noted", self._latest)
        if noted is None:
            return None
        if not isinstance(noted.plan, Tensor):
            noted.plan = torch.ones(noted.plan, dtype=torch.bool)
        return noted.plan

    @property
    def gates(self) -> Gates | None:
        """Gates for this thread's next forward, which uses them up.

        A float tensor ``(B, L)``; or a function of the :class:`~dynplan.policies.PlanRequest` that gives one;
        or a function with an attribute ``stepwise = True``, called as ``gates(layer, request, hidden)``
        before each layer, that gives ``(B,)``. Each sample's state becomes ``g * layer(h) + (1 - g) * h``.
        Where a gate has a gradient every sample is computed, since the gradient compares both; otherwise
        samples whose gate is zero are bypassed. Gates stand in place of the policy and of the budget.
        """
        return getattr(self._local, "gates", None)

    @gates.setter
    def gates(self, gates: Gates | None) -> None:
        self._local.gates = gates

    def run(self, request: PlanRequest, collect: bool = False) -> EncoderRun:
        """Run the encoder on a batch; the swapped forward calls this."""
        gates = self.gates
        self._local.gates = None
        request.budget = self._budget
        result = self._encoder.run(request, self._policy, gates, collect)
        self.note_plan(result.plan)
        return result

    def packed_weights(self) -> list[Tensor] | None:
        """Each layer's weights as the kernels read them, packed anew where the model's own have changed; None
        where only the layers' own modules will do (adapters, hooks)."""
        return self._encoder.packed()

    def note_plan(self, plan: Tensor | tuple[int, int]) -> None:
        """Sets :attr:`last_plan`, for those who run the encoder past :meth:`run`.

        Where every layer was kept, the plan's shape will do.
        """
        self._local.noted = self._latest = _Noted(plan)

    def refresh(self) -> None:
        """Take up the model's weights anew at the next forward.

        Needed only after a write in place through ``parameter.data``, of which PyTorch keeps no record;
        optimizer steps, ``load_state_dict`` and ``.to()`` are noticed.
        """
        self._encoder.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self._encoder, "policy": self._policy, "budget": self._budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["encoder"], state["policy"])
        self._budget = state["budget"]

    def __repr__(self) -> str:
        weights = f", weights={self.weights!r}" if self.weights else ""
        settings = f"policy={self._policy!r}, budget={self._budget}, num_layers={self.num_layers}{weights}"
        return f"Controller({settings})"
