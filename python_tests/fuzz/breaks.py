"""Makes a valid call one that may be invalid."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from .calls import FLOATS, INTEGERS, Draw

EDGES = [0, -1, 1, 2, 7, 2**15, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]


def break_call(d: Draw, arguments: list) -> list:
    """The arguments with one to three of them changed."""
    arguments = list(arguments)
    for _ in range(d.randint(1, 3)):
        if arguments:
            index = d.randrange(len(arguments))
            # A second change may ask for the memory of what the first one only said to be large.
            with suppress(RuntimeError, MemoryError):
                arguments[index] = broken(d, arguments[index])
    return arguments


def broken(d: Draw, value):
    """Something in the place of ``value``."""
    if d.random() < 0.05:
        return d.choice([None, 3, -1.5, "gelu", [], True, torch.zeros(2), np.zeros(2), b"x", {}])
    if isinstance(value, Tensor):
        return broken_tensor(d, value)
    if isinstance(value, np.ndarray):
        return broken_array(d, value)
    if isinstance(value, (list, tuple)):
        return broken_list(d, list(value))
    if isinstance(value, bool) or value is None:
        return d.choice([None, True, False, 1, torch.zeros(3)])
    if isinstance(value, int):
        return d.choice([*EDGES, value + 1, value - 1, float(value)])
    if isinstance(value, float):
        return d.choice([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e300, 1e-300, value])
    if isinstance(value, str):
        return d.choice(["", "x", value.upper(), value + "\0", "ä" * 1000])
    return value


def broken_list(d: Draw, values: list) -> list:
    if values and d.random() < 0.6:
        index = d.randrange(len(values))
        values[index] = broken(d, values[index])
        return values
    return d.choice([values[:-1], values + values[-1:], [], values * 3, values[::-1]])


def broken_tensor(d: Draw, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        return tensor
    changes: list[Callable[[], Tensor]] = [
        lambda: tensor.to(d.choice(DTYPES)),
        lambda: tensor.unsqueeze(d.randint(0, tensor.dim())),
        lambda: tensor[0] if tensor.dim() and len(tensor) else tensor,
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: torch.cat((tensor, tensor[:1])) if tensor.dim() else tensor,
        lambda: tensor.t() if tensor.dim() == 2 else tensor.flatten(),
        lambda: tensor[..., ::2] if tensor.dim() else tensor,
        lambda: tensor[..., :0] if tensor.dim() else tensor,
        lambda: tensor[:0] if tensor.dim() else tensor,
        lambda: tensor.expand(d.choice([2, 2**20, 2**40]), *tensor.shape),
        lambda: tensor.to("meta"),
        lambda: tensor.new_zeros(()),
        lambda: torch._neg_view(tensor) if tensor.is_floating_point() else tensor,
    ]
    if tensor.device.type == "cpu" and tensor.numel() <= 4096:
        changes.append(tensor.to_sparse)
        if tensor.numel() and d.random() < 0.5:
            return broken_values(d, tensor)
    return d.choice(changes)()


def broken_values(d: Draw, tensor: Tensor) -> Tensor:
    """The same but for a few elements."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8).mul(d.randint(2, 255)).view(torch.bool)  # true, of another byte
    if tensor.is_complex():
        return tensor
    tensor = tensor.clone()
    for _ in range(d.randint(1, 3)):
        index = tuple(d.randrange(n) for n in tensor.shape)
        if tensor.is_floating_point():
            tensor[index] = d.choice([float("nan"), float("inf"), -float("inf"), 3e38, -1e-38])
        else:
            least, most = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
            tensor[index] = d.choice([max(least, min(most, edge)) for edge in EDGES])
    return tensor


def broken_array(d: Draw, array: np.ndarray) -> np.ndarray:
    changes: list[Callable[[], np.ndarray]] = [
        lambda: array.astype(d.choice([np.float32, np.float64, np.int32, np.int64, np.uint8, bool])),
        lambda: array[..., None],
        lambda: array[:-1] if array.ndim else array,
        lambda: array[..., ::2] if array.ndim else array,
        lambda: array[:0] if array.ndim else array,
        lambda: array.T,
        lambda: np.asfortranarray(array),
        lambda: np.broadcast_to(array, (d.choice([2, 2**20, 2**40]), *array.shape)),
    ]
    with np.errstate(invalid="ignore"):
        if array.size and d.random() < 0.5:
            return broken_values(d, torch.from_numpy(array)).numpy()
        return d.choice(changes)()
