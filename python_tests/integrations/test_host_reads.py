"""No forward of a swapped model reads a value from its device: shown without one, on tensors that hold none.

A meta tensor has a device that is not the CPU and no numbers: whatever asks for one raises, be it ``item``,
``tolist``, ``nonzero`` or a copy to the CPU. Copies the other way must not wait either. The ops answer with
their fakes, so what is tested is everything round them; ``test_capture.py`` has the same on CUDA, kernels
included.
"""

from contextlib import nullcontext

import pytest
import torch
from integrations.models import batch, tiny
from integrations.test_capture import RerunGraph, exit_policies, policies
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynplan
from dynplan import cuda_graph as capturing
from dynplan.integrations.huggingface import encoder_state
from dynplan.policies import Policy, RandomPath

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Copies(TorchDispatchMode):
    """Notes what goes from the CPU to the device so that the host has to wait: copies, and tensors on the CPU
    that an operation on the device is given, to index with for example."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [value for value in tree_leaves((result, args, kwargs)) if isinstance(value, Tensor)]
        places = {tensor.device.type for tensor in tensors if tensor.dim() > 0 or tensor is result}
        hurries = function in COPIES and (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if len(places) > 1 and not hurries:
            self.waiting.append((str(function), args, kwargs))
        return result


@pytest.fixture
def meta(monkeypatch):
    """Swapped models on meta take CUDA's way; their packed weights are never read there."""
    monkeypatch.setattr(encoder_state, "DEVICES", ("cpu", "cuda", "meta"))
    blob = torch.empty(4 * 32 * 32 + 9 * 32 + 64 * 65, device="meta")
    monkeypatch.setattr(encoder_state.EncoderState, "packed", lambda self: [blob] * len(self.layers))
    return torch.device("meta")


def random_path():
    policy = RandomPath(0.5)
    policy._generators[torch.device("meta")] = torch.Generator()  # meta has none of its own
    return policy


def on(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize(
    "policy", [*policies(), *exit_policies(), random_path()], ids=lambda policy: type(policy).__name__
)
def test_forward(meta, policy):
    model, inputs = dynplan.swap(tiny(), policy).to(meta), on(meta, batch())
    with torch.no_grad():
        model(**inputs)  # moves the planner
        with Copies() as copies:
            logits = model(**inputs).logits
    assert logits.is_meta and logits.shape == (5, 3)
    assert not copies.waiting


@torch.no_grad()
def test_a_stream(meta):
    model, inputs = dynplan.swap(tiny(), exit_policies()[0]).to(meta), on(meta, batch())
    model.dynplan.budget = dynplan.StreamBudget(0.7)
    model(**inputs)  # moves exits and counts
    with Copies() as copies:
        assert model(**inputs).logits.is_meta
    assert not copies.waiting


def test_a_read_would_be_noticed(meta):
    class Reads(Policy):
        def plan(self, request):
            return (
                torch.ones(request.batch_size, request.num_layers, device=meta) > request.hidden.sum().item()
            )

    with torch.no_grad(), pytest.raises(RuntimeError, match="meta"):
        dynplan.swap(tiny(), Reads()).to(meta)(**on(meta, batch()))


@pytest.mark.parametrize(
    "wait",
    [
        lambda there: torch.ones(3).to(there),
        lambda there: torch.zeros(3, device=there).copy_(torch.ones(3)),
        lambda there: torch.zeros(3, device=there)[torch.tensor([0, 2])],
    ],
    ids=["to", "copy", "index"],
)
def test_a_wait_would_be_noticed(meta, wait):
    with Copies() as copies:
        torch.ones(3).to(meta, non_blocking=True).add_(1).copy_(torch.ones(3), non_blocking=True)
        assert not copies.waiting
        wait(meta)
    assert copies.waiting


@torch.no_grad()
def test_captured_calls(meta, monkeypatch):
    monkeypatch.setattr(capturing, "_why_not", lambda device: None)
    monkeypatch.setattr(capturing, "Graph", RerunGraph)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta
    model = dynplan.swap(tiny()).to(meta)
    captured = dynplan.capture(model, 6, 12)
    for policy in policies() + exit_policies():
        model.dynplan.policy = policy
        captured(**batch())
        with Copies() as copies:
            output = captured(**batch())
        assert output.logits.is_meta and output.logits.shape == (5, 3)
        assert not copies.waiting
