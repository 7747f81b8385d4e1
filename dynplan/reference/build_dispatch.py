"""What :mod:`dynplan.ops.build_dispatch` computes, for one layer."""

import torch
from torch import Tensor


def build_dispatch(keep: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.full((capacity,), -1, dtype=torch.int32)
    active_cu_seqlens = torch.zeros(len(keep) + 1, dtype=torch.int32)
    samples = filled = 0
    for b in keep.nonzero().flatten().tolist():
        start, end = cu_seqlens[b : b + 2].tolist()
        rows[filled : filled + end - start] = torch.arange(start, end, dtype=torch.int32)
        samples, filled = samples + 1, filled + end - start
        active_cu_seqlens[samples:] = filled
    return rows, active_cu_seqlens, torch.tensor([samples, filled], dtype=torch.int32)
