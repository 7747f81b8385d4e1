"""The dispatch of a plan: which packed rows each layer works on."""

from typing import NamedTuple

import torch
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.pack import check_size

_build_dispatch = find_op("build_dispatch")


class Dispatch(NamedTuple):
    """Active rows of one layer, or of all L layers (leading dimension L).

    Attributes:
        rows: int32 (T,) or (L, T), packed rows of the active samples, end to end; -1 beyond the last.
        cu_seqlens: int32 (B + 1,) or (L, B + 1), offsets of the active samples into ``rows``, the last offset
            repeated to the end.
        counts: int32 (2,) or (L, 2), number of active samples and of active rows.
    """

    rows: Tensor
    cu_seqlens: Tensor
    counts: Tensor

    def layer(self, index: int) -> "Dispatch":
        """The dispatch of one layer of all."""
        return Dispatch(self.rows[index], self.cu_seqlens[index], self.counts[index])


def build_dispatch(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> Dispatch:
    """Turns a plan into the rows each layer works on, all layers in one call.

    Args:
        keep: bool (B,) for one layer or (B, L) for all; True = layer included.
        cu_seqlens: int32 (B + 1,), offsets of the samples in the packed rows, from :func:`dynplan.ops.pack`.
        capacity: T, the number of packed rows (on CUDA the static capacity).

    Returns:
        :class:`Dispatch`, integers only: it carries no gradient.

    Raises:
        TypeError: ``keep`` is not bool or ``cu_seqlens`` not int32.
        ValueError: shapes or devices that do not fit; on CPU, offsets that do not ascend from 0 within the
            capacity.
    """
    return Dispatch(*_build_dispatch(keep, cu_seqlens, capacity))


@torch.library.register_fake("dynplan::build_dispatch")
def _build_dispatch_fake(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check_type(
        keep.dtype == torch.bool,
        lambda: f"build_dispatch: expected keep to be bool, got {keep.dtype}",
    )
    torch._check_value(
        keep.dim() in (1, 2),
        lambda: f"build_dispatch: expected keep to have shape (B,) or (B, L), got {list(keep.shape)}",
    )
    torch._check_value(
        cu_seqlens.dim() == 1 and cu_seqlens.shape[0] == keep.shape[0] + 1,
        lambda: (
            f"build_dispatch: expected cu_seqlens to have shape [{keep.shape[0] + 1}], "
            f"got {list(cu_seqlens.shape)}"
        ),
    )
    if isinstance(capacity, int):  # a symbol's sign is not asked for
        check_size("build_dispatch", "capacity", capacity)
    layers = keep.shape[1:]
    return (
        cu_seqlens.new_empty((*layers, capacity)),
        cu_seqlens.new_empty((*layers, keep.shape[0] + 1)),
        cu_seqlens.new_empty((*layers, 2)),
    )
