"""What :mod:`dynplan.ops.pack` computes."""

import torch
from torch import Tensor


def pack(hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keep = attention_mask.bool()
    indices = keep.flatten().nonzero().flatten().int()
    cu_seqlens = torch.zeros(len(hidden) + 1, dtype=torch.int32, device=hidden.device)
    cu_seqlens[1:] = keep.sum(1).cumsum(0)
    return hidden.flatten(0, 1)[indices], indices, cu_seqlens


def unpack(packed: Tensor, indices: Tensor, batch_size: int, length: int) -> Tensor:
    hidden = packed.new_zeros(batch_size * length, packed.shape[1])
    wanted = indices >= 0
    hidden = hidden.index_copy(0, indices[wanted].long(), packed[wanted])
    return hidden.view(batch_size, length, packed.shape[1])
