"""A learned planner under the budget's contract."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.budget import admit, choose_paths, sample_cap, token_cap, whole_layers, within_budget
from dynplan.nn.planner import planner_from_config
from dynplan.policies.base import BudgetPolicy, PlanRequest, Policy
from dynplan.policies.paths import KeepAll


class PlannerPolicy(BudgetPolicy):
    """A learned planner, upfront or stepwise, held to the budget.

    Args:
        planner: :class:`dynplan.nn.UpfrontPlanner`, :class:`dynplan.nn.StepwisePlanner`, or a module with
            their interface.
        budget: share of layer work, 0..1.

    Raises:
        TypeError: ``planner`` is not such a module, or ``budget`` not a number.
        ValueError: ``budget`` is not within 0..1.
    """

    def __init__(self, planner: nn.Module, budget: float = 1.0) -> None:
        super().__init__(budget)
        if not isinstance(planner, nn.Module) or not hasattr(planner, "stepwise"):
            raise TypeError(
                f"PlannerPolicy: expected planner to be a planner module, got {type(planner).__name__}"
            )
        self.planner = planner

    @property
    def stepwise(self) -> bool:
        return self.planner.stepwise

    def plan(self, request: PlanRequest) -> Tensor:
        budget = self.budget_of(request)
        planner = self._on(request.device)
        paths = getattr(planner, "paths", None)
        if paths is None and budget >= 1:
            return KeepAll().plan(request)  # whatever the scores are
        scores = planner(request.hidden, request.cu_seqlens, budget)
        if paths is None:
            return within_budget(scores, request.cu_seqlens, budget)
        return choose_paths(scores, paths, request.cu_seqlens, budget, self.planner.price(budget))

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        budget = self.budget_of(request)
        if budget >= 1:
            return torch.ones_like(plan[:, layer])  # whatever the scores are
        scores = self._on(request.device)(layer, hidden, request.cu_seqlens, budget)
        wanted = scores >= self.planner.threshold(budget)
        if len(scores) == 1:
            # As in within_budget: one sample's tokens and layers come to the same.
            spent = plan.sum() >= whole_layers(budget, plan.numel())
            return wanted & ~spent & (request.cu_seqlens[1:] > 0)
        lengths = request.cu_seqlens.diff()
        wanted &= lengths > 0
        samples = sample_cap(request.cu_seqlens, budget, request.num_layers) - plan.sum()
        tokens = token_cap(request.cu_seqlens, budget, request.num_layers)
        tokens = tokens - (plan * lengths.unsqueeze(1)).sum()
        return (
            admit(scores.masked_fill(~wanted, -math.inf), wanted.long(), lengths * wanted, samples, tokens)
            & wanted
        )

    def options(self) -> dict[str, Any]:
        return {"planner": self.planner.to_config(), "budget": self.budget}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Policy:
        return cls(**{**options, "planner": planner_from_config(options["planner"])})

    def _on(self, device: torch.device) -> nn.Module:
        # The planner is no submodule of the model, so model.to(device) does not move it.
        first = next(self.planner.parameters(), None)
        if first is not None and first.device != device:
            self.planner.to(device)
        return self.planner
