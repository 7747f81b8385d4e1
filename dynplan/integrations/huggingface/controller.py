"""The controller: what ``model.dynplan`` is."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynplan.integrations.huggingface.arguments import longest
from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.integrations.huggingface.families import Family
from dynplan.integrations.huggingface.head import Head
from dynplan.nn.exits import Exits
from dynplan.plans import Gates
from dynplan.policies import PlanRequest, Policy, check_budget
from dynplan.stream_budget import StreamBudget


class _Forward(NamedTuple):
    """What the last forward left behind: its plan, or the plan's shape where every layer was kept; and why it
    was not fused."""

    plan: Tensor | tuple[int, int] | None
    why_not_fused: str | None


class Controller:
    """Steers a swapped model between its forwards.

    It is a plain object, so neither it nor a planner it holds appears in the model's modules, parameters or
    ``state_dict``; deep copies and pickles of the model carry it along.

    Args:
        model: the bare model.
        family: of it.
        policy: decides the plans.
        weights: "int8" or "bfloat16": the type that the encoder's products run in; None: the model's own.
        whole: the model that was swapped: the bare one, or one with a head round it.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        policy: Policy,
        weights: str | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        self._model = model
        self._whole = model if whole is None else whole
        self._family = family
        self._weights = weights
        self._budget: float | StreamBudget | None = None
        self._state: EncoderState | None = None
        self._head: Head | None = None
        self._latest = _Forward(None, None)
        self._local = threading.local()
        self._told: set[str] = set()
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
    def budget(self) -> float | StreamBudget | None:
        """Share of layer work that each next batch may spend, 0..1; or a :class:`~dynplan.StreamBudget` over
        all batches; None: the policy's own budget."""
        return self._budget

    @budget.setter
    def budget(self, budget: float | StreamBudget | None) -> None:
        if budget is not None and not isinstance(budget, StreamBudget):
            budget = check_budget("dynplan", budget)
        self._budget = budget

    def request(
        self,
        batch_size: int,
        num_layers: int,
        hidden: Tensor,
        cu_seqlens: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> PlanRequest:
        """What the policy is asked for a batch."""
        stream = self._budget if isinstance(self._budget, StreamBudget) else None
        budget = self._budget if stream is None else stream.share
        inputs = (input_ids, attention_mask)
        return PlanRequest(batch_size, num_layers, hidden, cu_seqlens, budget, *inputs, stream, self.answer)

    def answer(self, states: Tensor) -> Tensor:
        """What the model's own head answers where it reads ``states`` in first position.

        Args:
            states: float ``(B, H)``.

        Returns:
            Logits ``(B, C)``.

        Raises:
            NotImplementedError: the model has no head, or one that reads other positions.
        """
        whole = self._whole
        if whole is self._model or not self._model.forward.reads_first:
            raise NotImplementedError(
                "dynplan: expected a model whose head reads the first position for a policy with exits, got "
                f"{type(whole).__name__}"
            )
        states = states.unsqueeze(1).to(self._model.dtype)
        self._local.given = states
        try:
            output = type(whole).forward(whole, inputs_embeds=states, return_dict=True)
        finally:
            self._local.given = None
        if "logits" not in output:
            raise NotImplementedError(
                f"dynplan: expected a head with one answer a sample, got {type(whole).__name__}"
            )
        return output.logits

    @property
    def given(self) -> Tensor | None:
        """Last states that this thread's forward of the encoder shall return, for :meth:`answer`."""
        return getattr(self._local, "given", None)

    @property
    def planner(self) -> nn.Module | None:
        """The policy's planner, if it has one."""
        return getattr(self._policy, "planner", None)

    @property
    def layers(self) -> nn.ModuleList:
        """The present layers."""
        return self._family.layers_of(self._model)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest(self) -> int:
        """Most tokens of a sample: what the position embeddings have room for.

        Raises:
            NotImplementedError: the forward is the model's own, which knows that itself.
        """
        if self._family.embedding_parts is None:
            raise NotImplementedError(
                f"dynplan: expected a model with a forward of ours, got {type(self._model).__name__}, whose "
                "own runs with planned layers"
            )
        return longest(getattr(self._model, self._family.embeddings), self._family.embedding_parts)

    @property
    def weights(self) -> str | None:
        """What the encoder's products run on: "int8", "bfloat16", or None for the model's own weights."""
        return self._weights

    @property
    def last_plan(self) -> Tensor | None:
        """bool ``(B, L)`` of this thread's last forward; a thread that ran none sees the latest of any."""
        last = self._last
        if isinstance(last.plan, tuple):
            last = last._replace(plan=torch.ones(last.plan, dtype=torch.bool))
            if hasattr(self._local, "last"):
                self._local.last = last
        return last.plan

    @property
    def why_not_fused(self) -> str | None:
        """Why this thread's last forward took the modules' way rather than the kernels'; None: it did not."""
        return self._last.why_not_fused

    @property
    def _last(self) -> _Forward:
        return getattr(self._local, "last", self._latest)

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

    def take_gates(self) -> Gates | None:
        """The gates, which are gone then."""
        gates = self.gates
        if gates is not None:
            self._local.gates = None
        return gates

    def state(self) -> EncoderState:
        """The encoder as it is, read again where anything has changed."""
        # Read once and written once, whole: another thread may come to the same conclusion meanwhile.
        state = self._state
        if state is None or not state.holds():
            state = self._state = EncoderState(self._model, self._family, self._weights)
        return state

    def head(self, exits: Exits) -> Head:
        """The model's own head as it is beside ``exits``, read again where anything has changed."""
        head = self._head
        if head is None or not head.holds(exits):
            head = self._head = Head(self._whole, self._model, exits, self.answer)
        return head

    def note(self, plan: Tensor | tuple[int, int], why_not_fused: str | None = None) -> None:
        """Sets :attr:`last_plan` and :attr:`why_not_fused`; where every layer was kept, the plan's shape will
        do."""
        self._local.last = self._latest = _Forward(plan, why_not_fused)

    def tell(self, reason: str | None, warn: bool) -> None:
        """Warn, once for each reason, that inference does not run on the kernels.

        Raises:
            RuntimeError: other weights were chosen than the modules have.
        """
        if reason is None:
            return
        if self._weights is not None:
            raise RuntimeError(
                f"dynplan: expected a forward for the kernels, got one they cannot do: {reason}; "
                f"the model was swapped with weights={self._weights!r}: call dynplan.unswap(model), then "
                "dynplan.swap(model) without weights="
            )
        if warn and not self._model.training and reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"dynplan: runs the model's own modules, not the kernels: {reason}", stacklevel=5)

    def refresh(self) -> None:
        """Read the model anew at the next forward, weights and all.

        Never needed for what can be seen: modules, hooks, numbers, and writes that change most of a weight.
        Needed after a write through ``parameter.data`` that touched a few elements only, and on CUDA after
        any write past PyTorch's version counters with no backward before it.
        """
        self._state = self._head = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_family", "_policy", "_weights", "_whole", "_budget")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*(state[f"_{name}"] for name in ("model", "family", "policy", "weights", "whole")))
        self._budget = state["_budget"]

    def __repr__(self) -> str:
        weights = f", weights={self.weights!r}" if self.weights else ""
        settings = f"policy={self._policy!r}, budget={self._budget}, num_layers={self.num_layers}{weights}"
        return f"Controller({settings})"
