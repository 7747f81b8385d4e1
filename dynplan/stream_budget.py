"""A budget over a stream of batches: easy texts leave room for hard ones that come later."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from dynplan._library import find_op
from dynplan.budget import admit, check_budget

# On the CPU, under one lock with encode_until_sure.
_arrive, _take, _add, _read, _write = (
    find_op(f"_stream_{name}") for name in ("arrive", "take", "add", "read", "write")
)
for _name in ("arrive", "add", "write"):
    torch.library.register_fake(f"dynplan::_stream_{_name}", lambda *_: None)
torch.library.register_fake("dynplan::_stream_take", lambda _, __, wanted, *rest: torch.empty_like(wanted))

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
        self._counts = torch.zeros(len(_COUNTS), dtype=torch.int64)

    @property
    def state(self) -> dict[str, int]:
        """What was seen and run so far: samples, tokens, sample_layers, token_layers, longest (tokens)."""
        with self._lock:
            return dict(zip(_COUNTS, self._numbers(), strict=True))

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        right = isinstance(state, dict) and set(state) == set(_COUNTS)
        if not right or not all(type(value) is int and 0 <= value < 2**62 for value in state.values()):
            raise ValueError(
                f"StreamBudget: expected state to map {', '.join(_COUNTS)} to integers from 0, got {state!r}"
            )
        values = [state[name] for name in _COUNTS]
        with self._lock:
            if self._counts.is_cpu:
                _write(self._counts, values)
            else:
                self._counts.copy_(torch.tensor(values))  # a graph holds its address

    def reset(self) -> None:
        """Forget the stream: the bucket is full again."""
        self.state = dict.fromkeys(_COUNTS, 0)

    def level(self, num_layers: int) -> Any:
        """How full the bucket is: layers that may still be run, over ``burst * L``; 1 at the start.

        A number on the CPU, a 0-d tensor on CUDA; 0 where ``burst`` is 0.
        """
        room = self.burst * num_layers
        with self._lock:
            counts = self._counts
            counts = _read(counts) if counts.is_cpu else counts
            return self._left(counts, num_layers)[0] / room if room else 0.0

    def arrive(self, cu_seqlens: Tensor) -> None:
        """Count a batch in, before anything is spent on it.

        Args:
            cu_seqlens: int32 ``(B + 1,)``.
        """
        with self._lock:
            counts = self.counts_beside(cu_seqlens)
            if counts.is_cpu:
                _arrive(counts, cu_seqlens)
            else:
                lengths = cu_seqlens.diff()
                counts[:2] += torch.stack(((lengths > 0).sum(), lengths.sum()))
                counts[4] = torch.maximum(counts[4], lengths.max())

    def take(
        self, priority: Tensor, wanted: Tensor, cu_seqlens: Tensor, steps: int, num_layers: int
    ) -> Tensor:
        """Let samples run ``steps`` layers more, and count it.

        They are taken in order of falling priority for as long as the contract holds.

        Args:
            priority: float32 ``(B,)``.
            wanted: bool ``(B,)``, samples that ask.
            cu_seqlens: int32 ``(B + 1,)``.
            steps: layers.
            num_layers: ``L``.

        Returns:
            bool ``(B,)``.
        """
        with self._lock:
            counts = self.counts_beside(priority)
            if counts.is_cpu:
                return _take(counts, priority, wanted, cu_seqlens, steps, num_layers, self.share, self.burst)
            lengths = cu_seqlens.diff()
            costs = wanted * steps
            room = self._left(counts, num_layers)
            taken = admit(priority.masked_fill(~wanted, -torch.inf), costs, costs * lengths, *room) & wanted
            counts[2:4] += torch.stack((taken.sum() * steps, (taken * lengths).sum() * steps))
            return taken

    def record(self, plan: Tensor, cu_seqlens: Tensor) -> None:
        """Count a batch and all that was run of it, where a policy kept to the share by itself.

        Args:
            plan: bool ``(B, L)``.
            cu_seqlens: int32 ``(B + 1,)``.
        """
        with self._lock:
            counts = self.counts_beside(plan)
            self.arrive(cu_seqlens)
            layers = plan.sum(1)
            run = layers.sum(), (layers * cu_seqlens.diff()).sum()
            if counts.is_cpu:
                _add(counts, [0, 0, *map(int, run), 0])
            else:
                counts[2:4] += torch.stack(run)

    def counts_beside(self, tensor: Tensor) -> Tensor:
        """The counts, int64 ``(5,)``, moved to where ``tensor`` is."""
        if tensor.device != self._counts.device:
            with self._lock:
                self._counts = torch.tensor(self._numbers(), device=tensor.device)
        return self._counts

    def _numbers(self) -> list[int]:
        counts = self._counts
        return _read(counts) if counts.is_cpu else counts.tolist()

    def _left(self, counts: Any, num_layers: int) -> tuple[Any, Any]:
        """Sample-layers and token-layers that may be run now."""
        samples, tokens, sample_layers, token_layers, longest = counts
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
