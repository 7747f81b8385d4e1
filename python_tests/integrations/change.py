"""What a change to a model is, and the table that the entries of ``changes.py`` go into."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from integrations.models import batch, encoder_of, tiny
from torch import nn

CHANGES: dict[str, "Change"] = {}
LENGTHS = (7, 3, 5)


@dataclass(frozen=True)
class Change:
    """Something done to a model, in the same way to a swapped one and to its untouched twin.

    Attributes:
        name: plain words with hyphens.
        apply: does it, in place. It may return the model to call from then on (a wrapper, a copy); a
            generator yields it, and undoes the change after that.
        weights: only the numbers of parameters change. Such a change is never refused, whatever the type of
            the weights.
        may_refuse: whether a swapped model may refuse it in float32 too.
        visible: whether the untouched model's answer changes.
        task: class of the model, by the end of its name.
        kind: model type.
        moments: restricts the moments at which it is tried; None: all.
        sweep: one of many alike, tried at fewer moments.
        slack: factor on the tolerance, where the change itself depends on rounding.
        trains: needs gradients, which int8 and bfloat16 weights refuse.
        inference: the model is built under ``inference_mode``.
        reduced: the changed model computes in a type with fewer bits.
        copies: the model to call from then on is another one.
    """

    name: str
    apply: Callable
    weights: bool = False
    may_refuse: bool = False
    visible: bool = True
    task: str = "ForTokenClassification"
    kind: str = "bert"
    sweep: bool = False
    slack: float = 1.0
    trains: bool = False
    inference: bool = False
    reduced: bool = False
    copies: bool = False

    def original(self) -> nn.Module:
        """A model of its own for the change to be made to."""
        key = (self.kind, self.task, self.inference)
        with torch.inference_mode(self.inference):
            if key not in _ORIGINALS:
                _ORIGINALS[key] = small(self.kind, self.task)
            return copy.deepcopy(_ORIGINALS[key])

    @contextmanager
    def made(self, model: nn.Module) -> Iterator[Callable]:
        """The change in force; gives the model to call."""
        torch.manual_seed(0)
        with torch.inference_mode() if self.inference else torch.enable_grad():
            done = self.apply(model)
            steps = done if inspect.isgenerator(done) else None
            called = next(steps) if steps else done
        try:
            yield model if called is None else called
        finally:
            if steps:
                next(steps, None)


_ORIGINALS: dict[tuple, nn.Module] = {}


def change(name: str, **options) -> Callable:
    """Registers the function it decorates."""

    def register(apply: Callable) -> Callable:
        add(name, apply, **options)
        return apply

    return register


def add(name: str, apply: Callable, **options) -> None:
    """One more entry."""
    if name in CHANGES:
        raise ValueError(f"two changes are called {name}")
    CHANGES[name] = Change(name, apply, **options)


def small(kind: str = "bert", task: str = "ForTokenClassification", seed: int = 0, **options) -> nn.Module:
    """A tiny model of two layers whose training mode is no matter of chance."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options}
    return tiny(kind, task, seed=seed, num_hidden_layers=2, **options)


def other(model: nn.Module) -> nn.Module:
    """A model of the same class and shape with other weights."""
    kind = model.config.model_type
    task = next(
        task
        for task in ("ForTokenClassification", "ForSequenceClassification", "Model")
        if type(model).__name__.endswith(task)
    )
    return small(kind, task, seed=1)


def layers(model: nn.Module) -> nn.ModuleList:
    return encoder_of(model).encoder.layer


def part(model: nn.Module, path: str) -> nn.Module:
    """A submodule by its path; ``encoder.`` and ``embeddings`` are those of the bare encoder."""
    if not path:
        return model
    owner = encoder_of(model) if path.split(".")[0] in ("encoder", "embeddings", "pooler") else model
    return owner.get_submodule(path)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at ``path``."""
    parent, _, name = path.rpartition(".")
    owner = (
        part(model, parent)
        if parent
        else encoder_of(model)
        if name in ("encoder", "embeddings", "pooler")
        else model
    )
    setattr(owner, name, module)


def ask(model: Callable) -> None:
    """Two forwards in the middle of a change, so that there is something to go stale; refusals are right."""
    for _ in range(2):
        with torch.no_grad(), suppress(RuntimeError, NotImplementedError, ValueError):
            model(**batch(LENGTHS))
