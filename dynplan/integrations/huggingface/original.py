"""An encoder by its model's own forward, whatever is in it: only the calls of its layers are planned.

The forward runs on a stand-in that shares modules, parameters and hooks with the model, but holds planned
layers in the place of the layers. Embeddings, masks, position biases and norms stay the model's own business,
so that a family needs no more than the path of its layers.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dynplan.integrations.huggingface.eager import names_of, run_layer
from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.ops.planned_encoder import pack_padded
from dynplan.plans import Decisions, taken
from dynplan.snapshot import capturing_hooks

Begin = Callable[[Tensor], "Decisions | list[Tensor]"]


def run_original(
    model: nn.Module,
    state: EncoderState,
    arguments: tuple[tuple, dict[str, Any]],
    begin: Begin,
) -> Any:
    """What the model's own forward gives with its layers planned.

    Args:
        model: the bare model.
        state: of it.
        arguments: of the forward, by position and by name.
        begin: called with the states ``(B, S, H)`` before the first layer. It gives the decisions; or, where
            something else has run the layers, the states after each of them, or after the last alone.

    Raises:
        NotImplementedError: the forward did not call each layer once, in their order.
    """
    args, options = arguments
    loop = _Loop(state, begin)
    *path, last = state.family.layers.split(".")
    owners = [model]
    for name in path:
        owners.append(owners[-1].get_submodule(name))
    if options.get("output_hidden_states", getattr(model.config, "output_hidden_states", False)):
        _install_capture(owners)  # now, lest they be hung on each stand-in anew
    planned = nn.ModuleList(PlannedLayer(layer, loop) for layer in getattr(owners[-1], last))
    twin = planned
    for owner, name in zip(reversed(owners), (last, *reversed(path)), strict=True):
        twin = _with_child(owner, name, twin)
    output = type(model).forward(twin, *args, **options)
    if loop.calls != len(state.layers):
        raise NotImplementedError(
            f"dynplan: expected {type(model).__name__} to call each of its {len(state.layers)} layers once, "
            f"got {loop.calls} calls; its loop has been replaced, or drops layers (layerdrop)"
        )
    return output


class PlannedLayer(nn.Module):
    """A layer in the stand-in's loop. What is not its own is the layer's."""

    def __init__(self, layer: nn.Module, loop: _Loop) -> None:
        super().__init__()
        self.layer = layer
        self.loop = loop
        self.training = layer.training

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.loop(self.layer, args, options)  # hooks hang on the layer, none on this

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["layer"], name)


def _with_child(owner: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A copy of ``owner`` that shares all but one child."""
    twin = object.__new__(type(owner))
    twin.__dict__.update(owner.__dict__, _modules={**owner._modules, name: child})
    return twin


class _Loop:
    """The calls of the layers in one forward."""

    def __init__(self, state: EncoderState, begin: Begin) -> None:
        self.state = state
        self.begin = begin
        self.calls = 0

    def __call__(self, layer: nn.Module, args: tuple, options: dict[str, Any]) -> Any:
        index, layers = self.calls, self.state.layers
        if index >= len(layers) or layers[index] is not layer:
            raise NotImplementedError(
                "dynplan: expected the layers to be called in their order, each once; their loop has been "
                "replaced"
            )
        self.calls += 1
        if args:
            before, args = args[0], args[1:]
        else:
            options = dict(options)
            before = options.pop(names_of(type(layer))[0])
        if index == 0:
            self.decide = self.begin(before)
        if isinstance(self.decide, list):
            known = self.decide
            whole = len(known) == len(layers)
            return self._give(layer, before, known[index] if whole else known[0] if index == 0 else before)
        return self._run(layer, index, before, args, options)

    def _run(self, layer: nn.Module, index: int, before: Tensor, args: tuple, options: dict[str, Any]) -> Any:
        keep, gate = self.decide(
            index, lambda: pack_padded(before, self.decide.request.attention_mask).hidden
        )
        computed = taken(keep, gate)
        if gate is None and bool(computed.all()):
            return layer(before, *args, **options)
        with _without_capture(layer):
            after = run_layer(self.state, layer, before, args, options, keep, gate)
        return self._give(layer, before, after)

    def _give(self, layer: nn.Module, before: Tensor, after: Tensor) -> Any:
        """``after`` in the form of the layer's output, and for whoever collects states."""
        outputs = self.state.family.outputs
        output = (after, *[None] * (outputs - 1)) if outputs else after
        hooks = list(_hooks_inside(layer))
        if len(hooks) > 1:
            raise NotImplementedError(
                f"dynplan: expected a model of which hidden states were never asked for, got one with "
                f"{type(layer).__name__}, which has several inside; load it anew"
            )
        for module, hook in hooks:
            hook(module, (before,), output)
        return output


def _hooks_inside(layer: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """Modules of a layer with the hooks by which transformers collects states."""
    for module in layer.modules():
        for hook in capturing_hooks(module):
            if inspect.getclosurevars(hook).nonlocals.get("key") == "hidden_states":
                yield module, hook


def _install_capture(owners: list[nn.Module]) -> None:
    """Let transformers hang on the layers what collects their states."""
    if importlib.util.find_spec("transformers.utils.output_capturing") is not None:
        capturing = importlib.import_module("transformers.utils.output_capturing")
        # The innermost model is the one that collects.
        capturing.maybe_install_capturing_hooks(
            [one for one in owners if isinstance(one, PreTrainedModel)][-1]
        )


@contextmanager
def _without_capture(layer: nn.Module) -> Iterator[None]:
    """Nothing is collected of what the layer does to a part of the batch."""
    if next(_hooks_inside(layer), None) is None:
        yield
        return
    from transformers.utils.output_capturing import _active_collector

    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)
