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
        """How full the bucket is: layers that may still be run, over ``burst * L``; 1 at the start.

        A number on the CPU, a 0-d tensor on CUDA; 0 where ``burst`` is 0.
        """
        room = self.burst * num_layers
        with self._lock:
            return self._left(num_layers)[0] / room if room else 0.0

    def arrive(self, cu_seqlens: Tensor) -> None:
        """Count a batch in, before anything is spent on it.

        Args:
            cu_seqlens: int32 ``(B + 1,)``.
        """
        with self._lock:
            counts = self._beside(cu_seqlens)
            if cu_seqlens.is_cpu:
                ends = cu_seqlens.tolist()
                lengths = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True) if end > begin]
                counts[0] += len(lengths)
                counts[1] += sum(lengths)
                counts[4] = max(counts[4], *lengths) if lengths else counts[4]
            else:
                lengths = cu_seqlens.diff()
                counts[:2] += torch.stack(((lengths > 0).sum(), lengths.sum()))
                counts[4] = torch.maximum(counts[4], lengths.max())

    def take(self, priority: Tensor, wanted: Tensor, lengths: Tensor, steps: int, num_layers: int) -> Tensor:
        """Let samples run ``steps`` layers more, and count it.

        They are taken in order of falling priority for as long as the contract holds.

        Args:
            priority: float ``(B,)``.
            wanted: bool ``(B,)``, samples that ask.
            lengths: integer ``(B,)``, tokens.
            steps: layers.
            num_layers: ``L``.

        Returns:
            bool ``(B,)``.
        """
        with self._lock:
            counts = self._beside(priority)
            samples, tokens = self._left(num_layers)
            if priority.is_cpu and len(priority) == 1:  # nobody to share with, no time to lose
                cost = steps * int(lengths)
                taken = bool(wanted) and steps <= samples and cost <= tokens
                counts[2] += steps * taken
                counts[3] += cost * taken
                return wanted & taken
            costs = wanted * steps
            taken = admit(priority.masked_fill(~wanted, -torch.inf), costs, costs * lengths, samples, tokens)
            taken &= wanted
            self._count(taken.sum() * steps, (taken * lengths).sum() * steps)
            return taken

    def record(self, plan: Tensor, cu_seqlens: Tensor) -> None:
        """Count a batch and all that was run of it, where a policy kept to the share by itself.

        Args:
            plan: bool ``(B, L)``.
            cu_seqlens: int32 ``(B + 1,)``.
        """
        with self._lock:
            self.arrive(cu_seqlens)
            layers = plan.sum(1)
            self._count(layers.sum(), (layers * cu_seqlens.diff()).sum())

    def _count(self, sample_layers: Tensor, token_layers: Tensor) -> None:
        counts = self._beside(sample_layers)
        if sample_layers.is_cpu:
            counts[2] += int(sample_layers)
            counts[3] += int(token_layers)
        else:
            counts[2:4] += torch.stack((sample_layers, token_layers))

    def _beside(self, tensor: Tensor) -> Any:
        """The counts where ``tensor`` is: numbers on the CPU, a tensor elsewhere."""
        at = None if tensor.is_cpu else tensor.device
        if at != getattr(self._counts, "device", None):
            numbers = [int(count) for count in self._counts]
            self._counts = numbers if at is None else torch.tensor(numbers, device=at)
        return self._counts

    def _left(self, num_layers: int) -> tuple[Any, Any]:
        """Sample-layers and token-layers that may be run now."""
        samples, tokens, sample_layers, token_layers, longest = self._counts
        share, room = self.share * num_layers, self.burst * num_layers
        # The small term undoes rounding, as in whole_layers.
        return (
            share * samples + room + 1e-6 - sample_layers,
            share * tokens + room * longest + 1e-6 - token_layers,
        )

    def to_config(self) -> dict[str, float]:
        """Constructor arguments as JSON values; what was seen is not among them."""
        return {"share": self.share, "burst": self.burst}

    def __repr__(self) -> str:
        return f"StreamBudget({self.share}, burst={self.burst:g})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.to_config(), "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["share"], state["burst"])
        self.state = state["state"]
