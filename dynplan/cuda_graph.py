"""``capture``: a swapped model behind CUDA graphs, recorded once and replayed for every batch and plan."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dynplan.integrations.huggingface.controller import Controller
from dynplan.ops.planned_encoder import offsets_of
from dynplan.plans import plan_upfront
from dynplan.policies import PlanRequest, Policy
from dynplan.stream_budget import StreamBudget

# Graphs kept at a time. Each distinct budget of a planner takes one; beyond that some are recorded again.
_MAX_GRAPHS = 8


def capture(model: nn.Module, batch_size: int, max_length: int) -> CapturedModel:
    """A callable that replays a CUDA graph of the model, whatever the inputs, their lengths and their plans.

    Inputs are padded to the static shape, which costs nothing in the encoder: padding is packed away on the
    device, and only kept samples are computed. Policies that read hidden states (planners) run inside the
    graph, the others before it; one graph serves all of the latter and every plan of theirs.

    Args:
        model: a swapped model (:func:`dynplan.swap`) in evaluation mode.
        batch_size: most samples of a batch.
        max_length: most tokens of a sample.

    Returns:
        :class:`CapturedModel`. For a model on CPU it calls the model directly, and warns once, saying so.

    Raises:
        TypeError, ValueError: a model that is not swapped; sizes that are not positive or too large for it.
        NotImplementedError: a model whose layers cannot run fused, with the reason.
        RuntimeError: the forward cannot be recorded, for example because a policy reads a device value.
    """
    return CapturedModel(model, batch_size, max_length)


class CapturedModel:
    """See :func:`capture`. Results are copies: the next call does not overwrite them.

    Calls from several threads or streams take turns. Weights that change in place, are loaded or moved are
    taken up at the next call. Autocast round a call changes nothing: the graph runs in the weights' own type.

    Attributes:
        model: the swapped model; set ``model.dynplan.policy`` and ``model.dynplan.budget`` as ever.
        batch_size: most samples of a batch.
        max_length: most tokens of a sample.
        reason: why the model is called directly, or None where graphs are replayed.
    """

    def __init__(self, model: nn.Module, batch_size: int, max_length: int) -> None:
        self.model = model
        self.batch_size = _positive("batch_size", batch_size)
        self.max_length = _positive("max_length", max_length)
        if not isinstance(getattr(model, "dynplan", None), Controller):
            raise TypeError(
                f"capture: expected a swapped model, got {type(model).__name__}; call dynplan.swap(model)"
            )
        limit = model.dynplan.longest
        if max_length > limit:
            raise ValueError(
                f"capture: expected max_length to be at most the model's {limit}, got {max_length}"
            )
        self._device = next(model.parameters()).device
        self._lock = threading.Lock()
        self._done: Any = None
        self._graphs: OrderedDict[tuple, _Recording] = OrderedDict()
        self.reason = _why_not(self._device)
        if self.reason is not None:
            warnings.warn(f"capture: calls the model directly: {self.reason}", stacklevel=3)
            return
        self._make_inputs()
        with self._lock, self._turn():
            self._recording()

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        """The model's output for a batch.

        Args:
            input_ids: integer ``(B, S)``, ``B <= batch_size``, ``S <= max_length``, on any device.
            attention_mask: ``(B, S)``, 1 at tokens; None: all are tokens.
            token_type_ids: integer ``(B, S)``; None: zeros.

        Returns:
            What ``model(...)`` returns, for ``B`` samples of ``S`` positions.

        Raises:
            ValueError: a batch or a length above what was captured, or shapes that do not fit.
            RuntimeError: the model is in training mode or has moved to another device, or gates are set.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given = {name: value for name, value in given.items() if value is not None}
        batch_size, length = self._check(given)
        if self.reason is not None:
            return self.model(**given)
        with self._lock, self._turn():
            self._fill(given, batch_size, length)
            recording = self._recording()
            if not recording.policy.reads_hidden:
                self._plan_outside(batch_size, length)
            output, plan = recording.graph.replay()
            self.model.dynplan.note(plan[:batch_size].clone())
            return _cut(output, batch_size, length)

    @torch.no_grad()
    def replay(self) -> Any:
        """Replays the graph of the latest call on the inputs of that call: what there is to time.

        Returns:
            The output for the captured shape, which the next call overwrites.

        Raises:
            RuntimeError: there is no graph, see :attr:`reason`.
        """
        if self.reason is not None:
            raise RuntimeError(f"capture: expected a graph to replay, got none: {self.reason}")
        with self._lock, self._turn():
            return next(reversed(self._graphs.values())).graph.replay()[0]

    def _check(self, given: dict[str, Tensor]) -> tuple[int, int]:
        shape = given["input_ids"].shape
        if len(shape) != 2:
            raise ValueError(f"capture: expected input_ids of shape (B, S), got {tuple(shape)}")
        for name, value in given.items():
            if value.shape != shape:
                raise ValueError(
                    f"capture: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}"
                )
        for name, size, most in (
            ("samples", shape[0], self.batch_size),
            ("tokens a sample", shape[1], self.max_length),
        ):
            if size > most:
                raise ValueError(f"capture: expected at most {most} {name}, as captured, got {size}")
        device = next(self.model.parameters()).device
        if device != self._device:
            raise RuntimeError(
                f"capture: expected the model on {self._device}, as captured, got {device}; capture it again"
            )
        if self.model.training:
            raise RuntimeError(
                "capture: expected the model in evaluation mode, got training mode; call model.eval()"
            )
        if self.model.dynplan.gates is not None:
            raise RuntimeError("capture: expected no gates, got some; they are for training")
        return shape[0], shape[1]

    def _make_inputs(self) -> None:
        shape = (self.batch_size, self.max_length)
        # int64 as tokenizers give them, so that recorded and direct calls look tables up alike.
        self._inputs = {
            name: torch.zeros(shape, dtype=torch.long, device=self._device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        layers = self.model.dynplan.num_layers
        self._plan = torch.zeros(self.batch_size, layers, dtype=torch.bool, device=self._device)

    def _fill(self, given: dict[str, Tensor], batch_size: int, length: int) -> None:
        # What an earlier call left elsewhere is padding by the mask, and ids that are no longer asked for do
        # no harm: only the mask is cleared as a whole.
        self._inputs["attention_mask"].zero_()
        for name, still in self._inputs.items():
            part = still[:batch_size, :length]
            if name in given:
                part.copy_(given[name], non_blocking=True)
            else:
                part.fill_(name == "attention_mask")

    def _plan_outside(self, batch_size: int, length: int) -> None:
        """Lets a policy that reads no hidden states plan the real batch, as it would without a graph."""
        controller = self.model.dynplan
        mask = self._inputs["attention_mask"][:batch_size, :length]
        request = controller.request(
            batch_size,
            controller.num_layers,
            hidden=self._plan.new_empty((0, 0), dtype=torch.float32),
            cu_seqlens=offsets_of(mask),
            input_ids=self._inputs["input_ids"][:batch_size, :length],
            attention_mask=mask,
        )
        self._plan.zero_()
        self._plan[:batch_size] = plan_upfront(controller.policy, request)

    def _recording(self) -> _Recording:
        """The graph for the present policy, budget and weights; recorded where there is none yet."""
        controller = self.model.dynplan
        policy = controller.policy
        weights = self._weights()
        stream = controller.budget if isinstance(controller.budget, StreamBudget) else None
        key = (
            (id(policy), controller.budget, getattr(policy, "budget", None))
            if policy.reads_hidden
            else (stream,)
        )
        recording = self._graphs.pop(key, None)
        if recording is None or not recording.holds(weights):
            recording = self._record(policy, weights)
        self._graphs[key] = recording  # the latest comes last
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return recording

    def _weights(self) -> list[Tensor]:
        state = self.model.dynplan.state()
        if state.why_not_fused is not None:
            raise NotImplementedError(
                f"capture: expected layers for the kernels, got some that are not: {state.why_not_fused}"
            )
        return state.packed()

    def _forward(self, policy: Policy) -> tuple[Any, Tensor]:
        controller = self.model.dynplan
        before = controller.policy
        controller.policy = policy
        try:
            # Autocast would leave the graph reading copies of weights that go when the caller's context ends.
            with torch.autocast(self._device.type, enabled=False):
                return self.model(**self._inputs), controller.last_plan
        finally:
            controller.policy = before

    def _record(self, policy: Policy, weights: list[Tensor]) -> _Recording:
        inside = policy if policy.reads_hidden else _PlanOf(self._plan)
        stream = self.model.dynplan.budget
        seen = stream.state if isinstance(stream, StreamBudget) else None
        graph = Graph(lambda: self._forward(inside), self._device)
        if seen is not None:  # recording is no part of the stream
            stream.state = seen
        return _Recording(graph, policy, weights, [*self.model.parameters(), *self.model.buffers()])

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The buffers are one call's at a time, on the device too: each waits for the one before it."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            yield
            self._done = stream.record_event()


class Graph:
    """A call recorded as a CUDA graph.

    Args:
        call: launches work on the current stream and never waits for it.
        device: where.

    Raises:
        RuntimeError: ``call`` cannot be recorded.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        before = torch.cuda.current_stream(device)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(before)
        with torch.no_grad(), torch.cuda.stream(aside):
            # Libraries set themselves up at their first calls, which a recording must not hold.
            for _ in range(2):
                call()
            before.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the device meanwhile.
                with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                    self._result = call()
            except RuntimeError as error:
                _end_failed_recording(device)
                raise RuntimeError(
                    f"capture: the forward cannot be recorded as a CUDA graph ({error}); does a policy read "
                    "a value from the device?"
                ) from error

    def replay(self) -> Any:
        """The result of the call, in the same tensors at every replay."""
        self._graph.replay()
        return self._result


def _end_failed_recording(device: torch.device) -> None:
    """Give the device's random numbers back: PyTorch ends the recording of its generator only where the whole
    recording succeeded, and refuses every draw until then. Any other one that succeeds will do."""
    with torch.cuda.device(device):
        anything = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            anything.zero_()


class _Recording:
    """A graph, and what it is a recording of."""

    def __init__(self, graph: Graph, policy: Policy, weights: list[Tensor], tensors: list[Tensor]) -> None:
        self.graph = graph
        self.policy = policy  # kept alive, so that no other policy can have its id
        self._weights = weights
        self._tensors = tensors
        self._addresses = [tensor.data_ptr() for tensor in tensors]

    def holds(self, weights: list[Tensor]) -> bool:
        """Whether the model's weights still lie where the graph reads them."""
        if len(weights) != len(self._weights) or any(
            a is not b for a, b in zip(weights, self._weights, strict=True)
        ):
            return False
        return all(tensor.data_ptr() == at for tensor, at in zip(self._tensors, self._addresses, strict=True))


class _PlanOf(Policy):
    """The plan that a buffer holds when the graph is replayed."""

    takes_budget = True

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def plan(self, request: PlanRequest) -> Tensor:
        return self._buffer


def _why_not(device: torch.device) -> str | None:
    """Why no graph can be recorded there."""
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, got a model on {device}"


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"capture: expected {name} to be a positive integer, got {value!r}")
    return value


def _cut(value: Any, batch_size: int, length: int) -> Any:
    """Copies of the tensors of a model's output, for the real batch; three dimensions are (B, S, ...)."""
    if isinstance(value, Tensor):
        part = value[:batch_size, :length] if value.dim() >= 3 else value[:batch_size]
        return part.clone(memory_format=torch.contiguous_format)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _cut(part, batch_size, length) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(part, batch_size, length) for part in value)
    return value
