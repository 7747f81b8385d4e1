"""What a policy is, what it may look at, and how one is found again by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynplan.budget import check_budget
from dynplan.stream_budget import StreamBudget


@dataclass(slots=True)
class PlanRequest:
    """What a policy may look at.

    Attributes:
        batch_size: ``B``.
        num_layers: ``L``.
        hidden: packed embeddings, floating ``(T, H)``; on CUDA rows beyond ``cu_seqlens[-1]`` hold nothing.
        cu_seqlens: int32 ``(B + 1,)``, offsets of the samples in ``hidden``.
        budget: share of layer work for this batch, 0..1, or None: the policy's own.
        input_ids: integer ``(B, S)`` as the model got them, or None (``inputs_embeds``).
        attention_mask: bool or integer ``(B, S)``, nonzero at tokens, or None: all are tokens.
        stream: the budget over all batches, or None; ``budget`` is its share then.
        answer: the model's own head, ``(B, H)`` -> logits ``(B, C)``: what it answers where it reads these
            states in first position; or None where the model has no such head.
        memory: for what a policy wants to remember within a forward.
    """

    batch_size: int
    num_layers: int
    hidden: Tensor
    cu_seqlens: Tensor
    budget: float | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    stream: StreamBudget | None = None
    answer: Callable[[Tensor], Tensor] | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the plan shall be: the device of the states."""
        return self.hidden.device


class Policy:
    """Base of all policies; subclass it for your own.

    A policy either plans the whole batch at once (:meth:`plan`) or, with ``stepwise = True``, one layer at a
    time (:meth:`keep`). A subclass is found again by its class name when a saved model is loaded, provided
    that its module has been imported.

    Set ``reads_hidden = False`` on an upfront policy that never looks at ``request.hidden``:
    :func:`dynplan.capture` then lets it plan outside of the CUDA graph, where it may draw random numbers, and
    one graph serves all its plans. With ``takes_stream`` a policy spends a :class:`~dynplan.StreamBudget`
    itself; one with ``reads_answers`` asks ``request.answer``, and its exits may read a sample
    (:meth:`reads`).
    """

    stepwise: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = False
    takes_stream: ClassVar[bool] = False
    reads_answers: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Policy]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Policy.registry[cls.__name__] = cls

    def plan(self, request: PlanRequest) -> Tensor:
        """Whole plan, bool ``(B, L)`` on the request's device."""
        raise NotImplementedError(f"{type(self).__name__}: expected plan() to be defined by the policy")

    def asks(self, request: PlanRequest) -> Sequence[int]:
        """The layers before which a stepwise policy decides, rising from 0: all of them by default. Until the
        next one, what :meth:`keep` said stands."""
        return range(request.num_layers)

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        """Decision for ``layer``, bool ``(B,)``, of a stepwise policy.

        Args:
            layer: 0-based index of the layer.
            request: what is known of the batch.
            hidden: packed states that are about to enter the layer, ``(T, H)``.
            plan: bool ``(B, L)``, decisions so far; False from ``layer`` on.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected keep() to be defined by the policy")

    def reads(self, request: PlanRequest, hidden: Tensor, plan: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which head reads a sample: the samples that an exit of the policy's reads, bool ``(B,)``, and what
        the model's head shall find in their first position, ``(B, H)``. None: it reads all states itself.

        Args:
            request: what is known of the batch.
            hidden: packed states after the last layer, ``(T, H)``.
            plan: bool ``(B, L)``, all decisions.
        """
        return None

    def options(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        return {}

    def to_config(self) -> dict[str, Any]:
        """JSON description, read by :func:`policy_from_config`. A planner's weights travel apart."""
        return {"type": type(self).__name__, **self.options()}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Policy:
        """The policy that :meth:`options` describes."""
        return cls(**options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"


class BudgetPolicy(Policy):
    """A policy with a budget of its own, which the model's budget replaces."""

    takes_budget = True

    def __init__(self, budget: float = 1.0) -> None:
        self.budget = check_budget(type(self).__name__, budget)

    def budget_of(self, request: PlanRequest) -> float:
        return self.budget if request.budget is None else request.budget


def policy_from_config(config: Mapping[str, Any]) -> Policy:
    """Build the policy that ``to_config`` described; a planner gets fresh weights.

    Args:
        config: JSON values, ``type`` among them.

    Returns:
        The policy.

    Raises:
        ValueError: unknown type, or arguments it does not take.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in Policy.registry:
        raise ValueError(
            f"policy_from_config: expected type to be a policy's, got {kind!r}; import the module that "
            f"defines it first; known are {sorted(Policy.registry)}"
        )
    try:
        return Policy.registry[kind].from_options(options)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"policy_from_config: expected the arguments of {kind}, got {sorted(options)}"
        ) from error
