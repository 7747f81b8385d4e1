"""A budget over a stream of batches: easy texts leave room for hard ones that come later."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from dynplan.budget import admit, check_budget

_COUNTS = ("samples", "tokens", "sample_layers", "token_layers", "longest")


class StreamBudget:
    """A contract over everything that a model has seen: a token bucket.

    After every batch::

        sample-layers run <= share * L * samples so far + burst * L
        token-layers run  <= share * L * tokens so far  + burst * L * longest sample so far

    A batch alone may spend more than ``share`` of its work or less, so that a batch of one text, too, can be
    given what it needs. Samples without tokens do not count. Policies that know no stream keep ``share`` in
    each batch, which keeps this contract as well.

    Safe to share between threads and between models of one number of layers. On CUDA the counts live on the
    device, so that a captured graph keeps them.

    Args:
        share: of the layer work, 0..1.
        burst: samples whose every layer may be run ahead of what was saved, at least 0.

    Raises:
        TypeError: not numbers.
        ValueError: out of range.
    """

    def __init__(self, share: float, burst: float = 16.0) -> None:
        self.share = check_budget("StreamBudget", share, "share")
        if isinstance(burst, bool) or not isinstance(burst, (int, float)):
            raise TypeError(f"StreamBudget: expected burst to be a number, got {type(burst).__name__}")
        if not 0 <= burst < 2**31:
            raise ValueError(f"StreamBudget: expected burst to be at least 0, got {burst}")
        self.burst = float(burst)
        self._lock = threading.RLock()
        self._counts: list[Any] = [0] * len(_COUNTS)

    @property
    def state(self) -> dict[str, int]:
        """What was seen and run so far: samples, tokens, sample_layers, token_layers, longest (tokens)."""
        with self._lock:
            return {name: int(count) for name, count in zip(_COUNTS, self._counts, strict=True)}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        right = isinstance(state, dict) and set(state) == set(_COUNTS)
        if not right or not all(type(value) is int and 0 <= value < 2**62 for value in state.values()):
            raise ValueError(
                f"StreamBudget: expected state to map {', '.join(_COUNTS)} to integers from 0, got {state!r}"
            )
        with self._lock:
            if isinstance(self._counts, Tensor):  # a graph holds its address
                self._counts.copy_(torch.tensor([state[name] for name in _COUNTS]))
            else:
                self._counts = [state[name] for name in _COUNTS]

    def reset(self) -> None:
        """Forget the stream: the bucket is full again."""
        self.state = dict.fromkeys(_COUNTS, 0)

    def level(self, num_layers: int) -> Any:
        """How full the bucket is: layers that may be run beyond the share, over ``burst * L``; 1 at the start,
        never below 0. A number on the CPU, a 0-d tensor on CUDA; 0 where ``burst`` is 0."""
        room = self.burst * num_layers
        with self._lock:
            return self._left(num_layers)[0] / room if room else 0.0

    def arrive(self, cu_seqlens: Tensor) -> None:
        """Count a batch in, before anything is spent on it.

        Args:
            cu_seqlens: int32 ``(B + 1,)``.
        """
        with self._lock:
            if cu_seqlens.is_cpu:
                ends = cu_seqlens.tolist()
                lengths = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True) if end > begin]
                counts = self._here(cu_seqlens)
                counts[0] += len(lengths)
                counts[1] += sum(lengths)
                counts[4] = max(counts[4], *lengths) if lengths else counts[4]
                return
            lengths, counts = cu_seqlens.diff(), self._here(cu_seqlens)
            counts[:2] += torch.stack(((lengths > 0).sum(), lengths.sum()))
            counts[4] = torch.maximum(counts[4], lengths.max())

    def take(self, priority: Tensor, layers: int, wanted: Tensor, lengths: Tensor) -> Tensor:
        """Let samples run ``layers`` more, in order of falling priority for as long as the contract holds, and
        count it.

        Args:
            priority: float ``(B,)``.
            layers: each sample would run.
            wanted: bool ``(B,)``, samples that ask.
            lengths: integer ``(B,)``, tokens.

        Returns:
            bool ``(B,)``.
        """
        with self._lock:
            counts = self._here(priority)
            samples, tokens = self._left(self._layers)
            if priority.is_cpu and len(priority) == 1:
                cost = layers * int(lengths)
                taken = bool(wanted) and layers <= samples and cost <= tokens
                counts[2] += layers * taken
                counts[3] += cost * taken
                return wanted & taken
            costs = wanted * layers
            priority = priority.masked_fill(~wanted, -torch.inf)
            taken = admit(priority, costs, costs * lengths, samples, tokens) & wanted
            spent = taken.sum() * layers, (taken * lengths).sum() * layers
            if priority.is_cpu:
                counts[2] += int(spent[0])
                counts[3] += int(spent[1])
            else:
                counts[2:4] += torch.stack(spent)
            return taken
