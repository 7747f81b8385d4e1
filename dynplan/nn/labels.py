"""What libraries hand over as labels, turned into the integers that the region loss takes."""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor

from dynplan.nn.region_cross_entropy import RegionCrossEntropyLoss


def held_loss(options: dict) -> RegionCrossEntropyLoss:
    """The loss inside an adapter, which has the adapter's options.

    Raises:
        TypeError: an option that it does not have; the text names the adapter.
    """
    known = signature(RegionCrossEntropyLoss).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"RegionLoss: expected options among {', '.join(known)}, got {name}")
    return RegionCrossEntropyLoss(**options)


def whole_labels(argument: str, labels: Tensor) -> Tensor:
    """Labels as integers, from whatever holds whole numbers; integers of any width are left as they are.

    Args:
        argument: the name that errors carry.
        labels: bool, integer or floating.

    Raises:
        TypeError: not a tensor.
        ValueError: on CPU, soft labels: the loss has windows of one label and would have to make hard ones of
            them. Elsewhere, and in a compiled graph, that is an assertion on the device.
    """
    check_tensor(argument, labels)
    if labels.dtype == torch.bool:
        return labels.to(torch.uint8)
    if not labels.is_floating_point():
        return labels
    whole = labels.long()
    require(
        labels == whole,
        f"RegionLoss: expected {argument} to hold whole labels",
        lambda bad: f"{labels[bad][0].item():g}",
    )
    return whole


def one_hot_labels(argument: str, labels: Tensor) -> Tensor:
    """Labels (N, *spatial) of a one-hot map (N, C, *spatial), bool, integer or floating.

    Raises:
        TypeError: not a tensor.
        ValueError: on CPU, a pixel with another number of classes than one, or soft ones; as for
            :func:`whole_labels`.
    """
    check_tensor(argument, labels)
    zeros_and_ones = ((labels == 0) | (labels == 1)).all(1)
    require(
        zeros_and_ones & (labels.sum(1) == 1),
        f"RegionLoss: expected {argument} to be one-hot over its channels",
        lambda bad: f"{labels.movedim(1, -1)[bad][0].tolist()} at a pixel",
    )
    return labels.to(torch.uint8).argmax(1)


def check_tensor(argument: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"RegionLoss: expected {argument} to be a tensor, got {type(value).__name__}")


def require(good: Tensor, expected: str, got: Callable[[Tensor], str]) -> None:
    """Raises unless all of ``good`` is true. ``got(~good)`` is asked where values may be read."""
    if good.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good.all(), expected)
    elif not good.all():
        raise ValueError(f"{expected}, got {got(~good)}")
