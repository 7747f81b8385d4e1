"""Padding out once before the first layer, and in once after the last."""

from typing import NamedTuple

import torch
from torch import Tensor

from dynplan._library import find_op

_pack = find_op("pack")
_unpack = find_op("unpack")
_unpack_backward = find_op("_unpack_backward")


class Packed(NamedTuple):
    """Tokens end to end without padding.

    Attributes:
        hidden: (T, H), the dtype of what was packed.
        indices: int32 (T,), flat positions ``b * S + s``, ascending.
        cu_seqlens: int32 (B + 1,), row b's tokens are ``hidden[cu_seqlens[b]:cu_seqlens[b + 1]]``.
    """

    hidden: Tensor
    indices: Tensor
    cu_seqlens: Tensor


def pack(hidden: Tensor, attention_mask: Tensor) -> Packed:
    """Removes padding.

    Args:
        hidden: (B, S, H), any dtype and strides.
        attention_mask: (B, S), bool or integer, 1 (keep) or 0 (padding); any pattern: left or right padding,
            holes, rows with no token.

    Returns:
        :class:`Packed`. On CPU ``T`` is the number of ones. On CUDA ``T = B * S`` whatever the mask holds, so
        that no size is read back to the host: the count is ``cu_seqlens[B]``, rows beyond it are zero and
        their indices -1.

    Raises:
        ValueError: shapes or devices that do not fit; on CPU, a mask entry other than 0 and 1 (CUDA takes any
            non-zero entry as 1: looking would need a device-to-host copy).
        TypeError: ``attention_mask`` is not bool or integer.
    """
    return Packed(*_pack(hidden, attention_mask))


def unpack(packed: Tensor, indices: Tensor, batch_size: int, length: int) -> Tensor:
    """Puts padding back, as zeros: the inverse of :func:`pack`.

    Args:
        packed: (T, H), any dtype.
        indices: int32 (T,), flat positions ``b * S + s``, each at most once; -1 marks a row to leave out.
        batch_size: B.
        length: S.

    Returns:
        (B, S, H), the dtype of ``packed``.

    Raises:
        ValueError: shapes, sizes or devices that do not fit.
        TypeError: ``indices`` is not int32.
        IndexError: on CPU, an index outside ``[-1, B * S)``.
    """
    return _unpack(packed, indices, batch_size, length)


def check_size(op: str, name: str, size: int) -> None:
    """As the kernels' own check of a number of samples, positions or rows."""
    if not 0 <= size < 2**31:
        raise ValueError(f"{op}: expected {name} in [0, 2^31), got {size}")


@torch.library.register_fake("dynplan::pack")
def _pack_fake(hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch._check_value(
        hidden.dim() == 3,
        lambda: f"pack: expected hidden to have shape (B, S, H), got {list(hidden.shape)}",
    )
    torch._check_value(
        attention_mask.shape == hidden.shape[:2],
        lambda: (
            f"pack: expected attention_mask to have shape {list(hidden.shape[:2])}, "
            f"got {list(attention_mask.shape)}"
        ),
    )
    batch_size, length, width = hidden.shape
    tokens = batch_size * length
    if hidden.device.type == "cpu":
        tokens = torch.library.get_ctx().new_dynamic_size()
    int32 = {"dtype": torch.int32}
    return (
        hidden.new_empty((tokens, width)),
        attention_mask.new_empty((tokens,), **int32),
        attention_mask.new_empty((batch_size + 1,), **int32),
    )


@torch.library.register_fake("dynplan::unpack")
def _unpack_fake(packed: Tensor, indices: Tensor, batch_size: int, length: int) -> Tensor:
    torch._check_value(
        packed.dim() == 2,
        lambda: f"unpack: expected packed to have shape (T, H), got {list(packed.shape)}",
    )
    torch._check_value(
        indices.dim() == 1,
        lambda: f"unpack: expected indices to have shape (T,), got {list(indices.shape)}",
    )
    for name, size in (("batch_size", batch_size), ("length", length)):
        if isinstance(size, int):  # a symbol's sign is not asked for
            check_size("unpack", name, size)
    return packed.new_empty((batch_size, length, packed.shape[1]))


@torch.library.register_fake("dynplan::_unpack_backward")
def _unpack_backward_fake(grad: Tensor, indices: Tensor) -> Tensor:
    torch._check_value(
        grad.dim() == 3,
        lambda: f"_unpack_backward: expected grad to have shape (B, S, H), got {list(grad.shape)}",
    )
    torch._check_value(
        indices.dim() == 1,
        lambda: f"_unpack_backward: expected indices to have shape (T,), got {list(indices.shape)}",
    )
    return grad.new_empty((indices.shape[0], grad.shape[2]))


def _save_pack(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _pack_backward(ctx, grad, *_):
    (indices,) = ctx.saved_tensors
    batch_size, length, _ = ctx.shape
    return _unpack(grad, indices, batch_size, length), None


def _save_unpack(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _unpack_grad(ctx, grad):
    (indices,) = ctx.saved_tensors
    return _unpack_backward(grad, indices), None, None, None


def _save_unpack_backward(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _unpack_backward_grad(ctx, grad):
    (indices,) = ctx.saved_tensors
    batch_size, length, _ = ctx.shape
    return _unpack(grad, indices, batch_size, length), None


torch.library.register_autograd("dynplan::pack", _pack_backward, setup_context=_save_pack)
torch.library.register_autograd("dynplan::unpack", _unpack_grad, setup_context=_save_unpack)
torch.library.register_autograd(
    "dynplan::_unpack_backward", _unpack_backward_grad, setup_context=_save_unpack_backward
)
