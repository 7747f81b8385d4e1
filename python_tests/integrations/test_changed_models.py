"""A swapped model gives what the untouched one would, whatever was done to it since: exactly, or it refuses.

Every change of ``changes.py`` is made to a deep copy of the original, which tells the truth, and to a
swapped one: before it was swapped, or after none, one or two forwards. Models swapped with ``weights=`` are
held to one that is swapped anew after the change, and to the truth within the error of their type.
"""

import re
from functools import cache

import pytest
import torch
from helpers import ATOL
from integrations.change import LENGTHS
from integrations.changes import CHANGES
from integrations.models import batch
from torch import Tensor

import dynplan
from dynplan.policies import KeepAll

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = batch(LENGTHS)
REFUSAL = re.compile(r"(dynplan|swap): .{30,}", re.DOTALL)
# What rounding the products' operands costs, as a share of the answer's norm.
REDUCED = {"bfloat16": 0.06, "int8": 0.25}


class Stepwise(KeepAll):
    """Keeps all, one layer at a time."""

    stepwise = True

    def keep(self, layer, request, hidden, plan):
        return torch.ones(request.batch_size, dtype=torch.bool, device=request.device)


WAYS = {
    "fp32": dict(),
    "stepwise": dict(policy=Stepwise()),
    "bfloat16": dict(weights="bfloat16"),
    "int8": dict(weights="int8"),
}
MOMENTS = {"before-the-swap": None, "before-any-forward": 0, "after-one-forward": 1, "after-two-forwards": 2}


class Refused(Exception):
    pass


def answer(model) -> list[Tensor]:
    """All that the model gives, at tokens."""
    with torch.no_grad():
        output = model(**INPUTS)
    mask = INPUTS["attention_mask"].bool()
    found = []

    def gather(value):
        if isinstance(value, Tensor):
            found.append((value[mask] if value.shape[:2] == mask.shape else value).detach())
        elif isinstance(value, (tuple, list)):
            for part in value:
                gather(part)

    gather(tuple(output.values()) if hasattr(output, "values") else output)
    return found


def refusals(call, *args):
    """What the call gives; Refused if it explains why it does not."""
    try:
        return call(*args)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if type(error) in (RuntimeError, NotImplementedError, TypeError, ValueError) and REFUSAL.match(
            str(error)
        ):
            raise Refused(str(error)) from error
        raise


@cache
def truth(name: str) -> tuple[list[Tensor], list[Tensor] | None]:
    """The untouched model's answer after the change, and the exact one where its type has few bits."""
    change = CHANGES[name]
    twin = change.original()
    before = answer(twin)
    with change.made(twin) as called:
        after = answer(called)
    if change.visible:
        moved = max((a.double() - b.double()).abs().max() for a, b in zip(after, before, strict=True))
        assert moved > (1e-4 if change.reduced else 1e-3), f"{name} changes nothing: {moved:.1e}"
    exact = None
    if change.reduced:
        with change.made(change.original()) as called:
            exact = answer(called.double()) if name != "autocast" else before
    return after, exact


@cache
def fresh(name: str, way: str) -> list[Tensor] | None:
    """The answer of a model swapped after the change; None where that is refused."""
    change = CHANGES[name]
    model = change.original()
    with change.made(model) as called:
        try:
            refusals(lambda: dynplan.swap(called if change.copies else model, **WAYS[way]))
            return refusals(answer, called)
        except Refused:
            return None


def worst(one: list[Tensor], two: list[Tensor]) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one, two, strict=True))


def norm(values: list[Tensor]) -> float:
    return sum(value.double().square().sum() for value in values).sqrt().item()


def assert_right(change, way, ours: list[Tensor]) -> None:
    theirs, exact = truth(change.name)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    scale = max(x.abs().max().item() for x in theirs)
    error, allowed = worst(ours, theirs), change.slack * 5e-6 * max(scale, 1)
    if error <= allowed:
        return
    if exact is not None:
        error, allowed = worst(ours, exact), 2 * worst(theirs, exact) + ATOL[theirs[0].dtype]
    if way not in REDUCED:
        assert error <= allowed, f"{error:.2e} off the untouched model, at a scale of {scale:.2e}"
        return
    share = norm([a.double() - b for a, b in zip(ours, theirs, strict=True)]) / norm(theirs)
    assert share <= REDUCED[way], f"{share:.3f} of the untouched model's answer off"
    again = fresh(change.name, way)
    if again is not None:
        error = worst(ours, again)
        assert error <= 1e-5 * scale, f"{error:.2e} off a model that is swapped anew"


def moments(change, way) -> list[str]:
    """When a change is made: at every moment where much may differ, at the last one elsewhere."""
    every = list(MOMENTS)
    if change.sweep and "with-kwargs" in change.name:
        return every[-1:] if way == "fp32" else []
    if way == "fp32":
        if change.sweep:
            return [every[0], every[-1]]
        return every[1:] if change.weights else every
    if change.weights:
        return [every[1], every[-1]] if way == "int8" else every[-1:]
    if way == "bfloat16" or (way == "int8" and change.trains):  # as int8; and refused in training
        return []
    return every[-1:]


def cases():
    for name, change in CHANGES.items():
        for way in WAYS:
            for moment in moments(change, way):
                yield pytest.param(name, way, moment, id=f"{name}-{way}-{moment}")


@pytest.mark.parametrize(("name", "way", "moment"), cases())
def test_changed(name, way, moment):
    change, forwards = CHANGES[name], MOMENTS[moment]
    may_refuse = change.may_refuse or (way in REDUCED and not change.weights)
    truth(name)
    model = change.original()
    if forwards is not None:
        dynplan.swap(model, **WAYS[way])
        for _ in range(forwards):
            answer(model)
    with change.made(model) as called:
        try:
            if forwards is None:
                refusals(lambda: dynplan.swap(model, **WAYS[way]))
            ours = refusals(answer, called)
        except Refused as refused:
            if not may_refuse:
                pytest.fail(f"refused: {refused}")
            return
    assert_right(change, way, ours)
