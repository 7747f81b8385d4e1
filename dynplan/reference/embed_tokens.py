"""What :mod:`dynplan.ops.embed_tokens` computes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynplan.reference.pack import pack


def embed_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    type: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    if padding_idx is not None:
        is_text = input_ids != padding_idx
        columns = is_text.cumsum(1) * is_text + padding_idx
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    embedded = F.layer_norm(
        word[input_ids] + type[types] + position[columns], word.shape[1:], norm_weight, norm_bias, eps
    )
    return pack(embedded, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
