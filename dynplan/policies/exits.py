"""Answers on the way: a sample leaves at the first exit whose answer is sure enough.

All policies here share the exits (:class:`dynplan.nn.Exits`), the contract and the tables; they differ in
what they call sure. Within a batch the least sure go on first, for as long as the budget pays for it. Under a
:class:`~dynplan.StreamBudget` a threshold decides, which follows what the stream has left, so that a batch of
one text is given what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynplan.budget import admit, sample_cap, token_cap, whole_layers
from dynplan.nn.exits import Exits
from dynplan.nn.planner import planner_from_config
from dynplan.ops.encode_until_sure import Rungs
from dynplan.policies.base import BudgetPolicy, PlanRequest

_SWAY = 0.5  # how far the stream's level moves the budget that the threshold is taken at, as a share of it


class ConfidenceExit(BudgetPolicy):
    """Leaves at an exit whose answer is confident: its largest probability at a temperature per exit, or for
    regression the error that a small network expects. Temperatures: arXiv 1706.04599.

    Two or three exits of all that there are, and the threshold, belong to a budget; they are chosen on
    held-out training rows (:func:`dynplan.training.calibration.calibrate`). One exit for all samples is among
    the choices, so that no fixed depth is better there.

    Args:
        planner: the exits.
        budget: share of layer work, 0..1.
        chains: the choices: for each the depths at which samples may leave, rising; ``L`` for the full path.
        choice: which of ``chains`` at the budgets ``0, 1/n, ..., 1``.
        thresholds: for each of ``chains`` the sureness to leave with, at the same budgets.
            Without these three every exit is asked, and whoever the budget pays for goes on.

    Raises:
        TypeError: ``planner`` is not :class:`~dynplan.nn.Exits`.
        ValueError: tables that do not fit each other or the exits.
    """

    stepwise = True
    takes_stream = True
    reads_answers = True

    def __init__(
        self,
        planner: Exits,
        budget: float = 1.0,
        chains: Sequence[Sequence[int]] | None = None,
        choice: Sequence[int] | None = None,
        thresholds: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(budget)
        name = type(self).__name__
        if not isinstance(planner, Exits):
            raise TypeError(f"{name}: expected planner to be dynplan.nn.Exits, got {type(planner).__name__}")
        self.planner = planner
        every = (*planner.depths, planner.num_layers)
        if chains is None and choice is None and thresholds is None:
            chains, choice, thresholds = (every,), (0,), ((float("inf"),),)
        self.chains = tuple(tuple(chain) for chain in chains or ())
        self.choice = tuple(choice or ())
        self._tables: dict[Any, Tensor] = {}  # of thresholds, on devices
        self.thresholds = tuple(tuple(map(float, row)) for row in thresholds or ())
        for chain in self.chains:
            if not chain or not set(chain) <= set(every) or list(chain) != sorted(set(chain)):
                raise ValueError(f"{name}: expected chains to rise within the depths {every}, got {chain}")
        if not self.choice or not all(type(i) is int and 0 <= i < len(self.chains) for i in self.choice):
            raise ValueError(f"{name}: expected choice to hold indices of {len(self.chains)} chains")
        if [len(row) for row in self.thresholds] != [len(self.choice)] * len(self.chains):
            raise ValueError(
                f"{name}: expected thresholds for {len(self.chains)} chains at {len(self.choice)} budgets"
            )

    def sureness(self, index: int, answers: Tensor, pooled: Tensor, request: PlanRequest) -> Tensor:
        """How sure each answer at exit ``index`` is, ``(B,)``; higher is surer.

        Args:
            index: of the exit, in order of depth.
            answers: float ``(B, C)``, of the model's head.
            pooled: ``(B, H)``, means of the samples' rows.
            request: the batch; ``request.memory`` holds what a policy wants to remember within a forward.
        """
        return self.planner.sureness(index, answers, pooled)

    def rungs(self, request: PlanRequest) -> Rungs | None:
        """The same decisions for :func:`~dynplan.ops.encode_until_sure`, on the CPU; None: it does not know
        them."""
        kind, planner = type(self), self.planner
        sureness, methods = _KNOWN.get(kind, (None, ()))
        own = all(getattr(kind, name) is method for name, method in methods)
        if sureness is None or not own or not vars(self).keys().isdisjoint(DECIDING):
            return None
        chain = self._chain(request)
        indices = [planner.depths.index(depth) for depth in chain if depth < request.num_layers]
        measures, temperatures = [], []
        if sureness == "confidence" and planner.regression:
            sureness = "error"
            parts = [part for i in indices for part in (planner.errors[i][0], planner.errors[i][2])]
            measures = [tensor for part in parts for tensor in (part.weight, part.bias)]
        elif sureness == "confidence":
            every = planner.temperatures.tolist()
            temperatures = [every[i] for i in indices]
        elif sureness == "learned":
            parts = [planner.certainty[i] for i in indices]
            measures = [tensor for part in parts for tensor in (part.weight, part.bias)]
        exits = [tensor for i in indices for tensor in (planner.heads[i].weight, planner.heads[i].bias)]
        row = self.thresholds[self.chains.index(chain)] if chain in self.chains else (float("inf"),)
        stream, budget = request.stream, self.budget_of(request)
        decision = (chain, exits, sureness, measures, temperatures, row, budget)
        if stream is None:
            return Rungs(*decision)
        return Rungs(*decision, stream.counts_beside(planner.temperatures), stream.burst, _SWAY)

    def asks(self, request: PlanRequest) -> tuple[int, ...]:
        chain = self._chain(request)
        return (0, *(depth for depth in chain if depth < request.num_layers))

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        chain = self._chain(request)
        lengths = request.cu_seqlens.diff()
        if layer == 0:
            if request.stream is not None:
                request.stream.arrive(request.cu_seqlens)
            return self._spend(chain[0] if chain else 0, lengths > 0, lengths, None, request, plan)
        running = plan[:, layer - 1]
        if layer == chain[-1] or (running.is_cpu and not running.any()):
            return torch.zeros_like(running)
        index = self.planner.depths.index(layer)
        exits = self._on(request.device)
        pooled, states = exits.read(index, hidden, request.cu_seqlens)
        request.memory[index] = states
        surely = self.sureness(index, request.answer(states), pooled, request)
        following = chain[chain.index(layer) + 1]
        if request.stream is not None or following != chain[-1]:
            wanted = running & (surely < self._threshold(chain, request))
        else:
            wanted = running  # the contract alone decides who goes on to the end
        return self._spend(following - layer, wanted, lengths, -surely, request, plan)

    def reads(self, request: PlanRequest, hidden: Tensor, plan: Tensor) -> tuple[Tensor, Tensor] | None:
        mine = given = None
        for depth in self._chain(request):
            if depth == request.num_layers:
                continue
            here = plan[:, depth - 1] & ~plan[:, depth]
            if here.is_cpu and not here.any():
                continue
            index = self.planner.depths.index(depth)
            states = request.memory.get(index)
            if states is None or torch.is_grad_enabled():
                states = self._on(request.device).read(index, hidden, request.cu_seqlens)[1]
            mine = here if mine is None else mine | here
            given = states if given is None else torch.where(here.unsqueeze(1), states, given)
        return None if mine is None else (mine, given)

    def options(self) -> dict[str, Any]:
        return {
            "planner": self.planner.to_config(),
            "budget": self.budget,
            "chains": [list(chain) for chain in self.chains],
            "choice": list(self.choice),
            "thresholds": [[min(max(t, -3e38), 3e38) for t in row] for row in self.thresholds],
        }

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> ConfidenceExit:
        return cls(**{**options, "planner": planner_from_config(options["planner"])})

    def _chain(self, request: PlanRequest) -> tuple[int, ...]:
        """The depths at which samples of this batch may leave."""
        if request.num_layers != self.planner.num_layers:
            raise ValueError(
                f"{type(self).__name__}: expected a model of {self.planner.num_layers} layers, as the exits "
                f"are for, got {request.num_layers}"
            )
        budget = self.budget_of(request)
        chain = self.chains[self.choice[int(budget * (len(self.choice) - 1) + 1e-6)]]
        if request.stream is None:
            most = whole_layers(budget, request.num_layers)
            if request.batch_size == 1 or chain[0] > most:  # nobody to trade with
                return tuple(d for d in (*self.planner.depths, request.num_layers) if d <= most)[-1:]
        return chain

    def _threshold(self, chain: tuple[int, ...], request: PlanRequest) -> Any:
        budget = self.budget_of(request)
        row = self.thresholds[self.chains.index(chain)]
        if request.stream is not None:
            # The price follows the level: a full bucket is generous, an empty one mean.
            level = request.stream.level(request.num_layers)
            budget = budget * (1 + _SWAY * (2 * level - 1))
        place = budget * (len(row) - 1) + 1e-6
        if isinstance(place, Tensor):
            table = self._tables.get((chain, request.device))
            if table is None:  # made once: a graph that is being recorded cannot copy from the host
                table = self._tables[chain, request.device] = torch.tensor(row, device=request.device)
            return table.take(place.long().clamp(0, len(row) - 1))  # an index would be read by the host
        return row[min(max(int(place), 0), len(row) - 1)]

    def _spend(
        self,
        steps: int,
        wanted: Tensor,
        lengths: Tensor,
        priority: Tensor | None,
        request: PlanRequest,
        plan: Tensor,
    ) -> Tensor:
        """Who of those that want it runs ``steps`` layers more, within the contract."""
        if request.stream is not None:
            priority = torch.zeros_like(lengths, dtype=torch.float32) if priority is None else priority
            return request.stream.take(
                priority.float(), wanted, request.cu_seqlens, steps, request.num_layers
            )
        if priority is None:
            return wanted if steps else torch.zeros_like(wanted)
        budget, layers = self.budget_of(request), request.num_layers
        samples = sample_cap(request.cu_seqlens, budget, layers) - plan.sum()
        tokens = token_cap(request.cu_seqlens, budget, layers) - (plan * lengths.unsqueeze(1)).sum()
        costs = wanted * steps
        priority = priority.masked_fill(~wanted, -torch.inf)
        return admit(priority, costs, costs * lengths, samples, tokens) & wanted

    def _on(self, device: torch.device) -> Exits:
        # The exits are no submodule of the model, so model.to(device) does not move them.
        if self.planner.temperatures.device != device:
            self.planner.to(device)
        return self.planner


class EntropyExit(ConfidenceExit):
    """Leaves where the entropy of the answer is low: DeeBERT (Xin et al., arXiv 2004.12993) and FastBERT
    (arXiv 2004.02178). Classes only."""

    def sureness(self, index: int, answers: Tensor, pooled: Tensor, request: PlanRequest) -> Tensor:
        logs = answers.float().log_softmax(1)
        return (logs.exp() * logs).sum(1)


class PatienceExit(ConfidenceExit):
    """Leaves once so many exits in a row have given the same answer: PABEE (Zhou et al., arXiv 2006.04152).
    For regression
    the same means closer than ``tolerance`` of that paper's setting, 0.05 of a unit.
    """

    def sureness(self, index: int, answers: Tensor, pooled: Tensor, request: PlanRequest) -> Tensor:
        before, count = request.memory.get("patience", (None, None))
        answer = answers[:, 0] if self.planner.regression else answers.argmax(1)
        if before is None:
            count = torch.zeros(len(answer), device=answer.device)
        else:
            same = (answer - before).abs() < 0.05 if self.planner.regression else answer == before
            count = (count + 1) * same
        request.memory["patience"] = answer, count
        return count


class LearnedExit(ConfidenceExit):
    """Leaves where a learned linear map of the states says that the answer is right: BERxiT (Xin et al.,
    EACL 2021)."""

    def sureness(self, index: int, answers: Tensor, pooled: Tensor, request: PlanRequest) -> Tensor:
        return self.planner.certainty[index](pooled).squeeze(1)


# The policies whose decisions encode_until_sure knows: these very classes with these very methods.
DECIDING = ("sureness", "asks", "keep", "reads", "budget_of", "_chain", "_threshold", "_spend")
_KNOWN = {
    kind: (sureness, [(name, getattr(kind, name)) for name in DECIDING])
    for kind, sureness in {
        ConfidenceExit: "confidence",
        EntropyExit: "entropy",
        PatienceExit: "patience",
        LearnedExit: "learned",
    }.items()
}
