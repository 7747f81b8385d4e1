"""Exits that no answer decides about: a hash of the text, or chance. They show what reading answers is worth.

Both share everything else with :class:`~dynplan.policies.ConfidenceExit`: exits, contract, stream and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynplan.nn.exits import Exits
from dynplan.ops.encode_until_sure import Rungs
from dynplan.policies.base import PlanRequest
from dynplan.policies.exits import DECIDING, ConfidenceExit
from dynplan.policies.paths import hash_tokens, mix


class _Mixture(ConfidenceExit):
    """Leaves at the first exit whose threshold the sample's number, uniform in 0..1, reaches."""

    def __init__(
        self,
        planner: Exits,
        budget: float = 1.0,
        chains: Sequence[Sequence[int]] | None = None,
        choice: Sequence[int] | None = None,
        thresholds: Sequence[Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(planner, budget, chains, choice, thresholds)
        self.seed = int(seed)

    def numbers(self, request: PlanRequest) -> Tensor:
        """int64 ``(B,)``, random bits, one number for each sample."""
        raise NotImplementedError(f"{type(self).__name__}: expected numbers() to be defined by the policy")

    def sureness(self, index: int, answers: Tensor, pooled: Tensor, request: PlanRequest) -> Tensor:
        return self._uniform(request)

    def rungs(self, request: PlanRequest) -> Rungs | None:
        # Of one sample alone native code need not know why it stays or goes on.
        changed = type(self) not in (HashExit, RandomExit) or not vars(self).keys().isdisjoint(DECIDING)
        if request.batch_size != 1 or changed:
            return None
        chain = self._chain(request)
        if len(chain) > 1 and self._uniform(request) >= self._threshold(chain, request):
            chain = chain[:1]
        # Whoever goes on asks at each exit whether the contract pays for it: no answer there is sure enough.
        indices = [self.planner.depths.index(depth) for depth in chain if depth < request.num_layers]
        heads = [self.planner.heads[i] for i in indices]
        exits = [tensor for head in heads for tensor in (head.weight, head.bias)]
        decision = (chain, exits, "entropy", (), (), (3e38,), self.budget_of(request))
        stream = request.stream
        if stream is None:
            return Rungs(*decision)
        return Rungs(*decision, stream.counts_beside(self.planner.temperatures), stream.burst, 0.0)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "seed": self.seed}

    def _uniform(self, request: PlanRequest) -> Tensor:
        drawn = request.memory.get("drawn")
        if drawn is None:
            # As many bits as float32 holds, and none of the uppermost, which mix() leaves alike.
            bits = (self.numbers(request) >> 16) & 0xFFFFFF
            drawn = request.memory["drawn"] = bits.float() / 2**24
        return drawn


class HashExit(_Mixture):
    """Leaves by a hash of the sample's tokens: HashEE (Sun et al., arXiv 2203.01670), which gives each token
    a layer of its own; here a sample has one, so that the same exits can be compared.

    Args:
        planner, budget, chains, choice, thresholds: as for :class:`~dynplan.policies.ConfidenceExit`; a
            sample leaves where its number, uniform in 0..1, is at least the threshold.
        seed: of the hash.

    Raises:
        ValueError: besides, at the forward, where a model is given no ``input_ids``.
    """

    def numbers(self, request: PlanRequest) -> Tensor:
        return hash_tokens("HashExit", request, self.seed)


class RandomExit(_Mixture):
    """Leaves by chance, drawn anew in each forward.

    Args:
        planner, budget, chains, choice, thresholds: as for :class:`~dynplan.policies.HashExit`.
        seed: of the sequence of draws.

    Raises:
        ValueError: as :class:`~dynplan.policies.ConfidenceExit`.
    """

    def __init__(
        self,
        planner: Exits,
        budget: float = 1.0,
        chains: Sequence[Sequence[int]] | None = None,
        choice: Sequence[int] | None = None,
        thresholds: Sequence[Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(planner, budget, chains, choice, thresholds, seed)
        self._forwards = torch.zeros(1, dtype=torch.int64)

    def numbers(self, request: PlanRequest) -> Tensor:
        # A count on the device draws anew in each replay of a captured graph, where a generator of the host's
        # cannot.
        if self._forwards.device != request.device:
            self._forwards = self._forwards.to(request.device)
        self._forwards += 1
        samples = torch.arange(request.batch_size, device=request.device)
        return mix(mix(mix(self._forwards) + self.seed) + samples)
