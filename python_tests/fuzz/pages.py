"""Tensors whose memory ends, or begins, at a page that nobody may touch: who reads beyond it is killed."""

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PRIVATE, _ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS


def _map(pages: int) -> int:
    """Address of ``pages`` pages between two that may not be touched."""
    size = (pages + 2) * PAGE
    begin = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
    if begin in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    for guard in (begin, begin + size - PAGE):
        if _libc.mprotect(guard, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return begin + PAGE


class Pages:
    """Memory for the tensors of one input; nobody may hold them beyond :meth:`reset`."""

    def __init__(self) -> None:
        self._mapped: dict[int, list[int]] = {}
        self._used: dict[int, int] = {}

    def reset(self) -> None:
        self._used.clear()

    def _take(self, size: int) -> tuple[int, int]:
        pages = 1 << max(0, (size - 1) // PAGE).bit_length()
        mapped, used = self._mapped.setdefault(pages, []), self._used.get(pages, 0)
        if used == len(mapped):
            mapped.append(_map(pages))
        self._used[pages] = used + 1
        return mapped[used], pages * PAGE

    def put(self, tensor: Tensor, at_end: bool = True) -> Tensor:
        """A copy with the same shape, strides and values, that ends (or begins) at such a page."""
        span = 0
        if tensor.numel():
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if span == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        size = span * tensor.element_size()
        begin, room = self._take(size)
        memory = (ctypes.c_char * size).from_address(begin + room - size if at_end else begin)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span)
        flat.view(torch.uint8).zero_()
        source = torch.as_strided(tensor, (span,), (1,))
        flat.copy_(source)
        return torch.as_strided(flat, tensor.shape, tensor.stride())

    def put_array(self, array: np.ndarray, at_end: bool = True) -> np.ndarray:
        """The same for an array."""
        return self.put(torch.from_numpy(array), at_end).numpy()
