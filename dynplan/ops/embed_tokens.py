"""BERT's embeddings of the real tokens alone: lookup, sum, layer norm and pack in one pass.

Two ways through: on a CPU in float32 without gradients one C++ call; everything else composed of PyTorch
operations and ``pack``, differentiable, with the bits of the Hugging Face modules.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dynplan._library import find_op
from dynplan.ops.pack import Packed, pack

_embed_tokens = find_op("embed_tokens")


def embed_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    type: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> Packed:
    """``LayerNorm(word[input_ids] + type[token_type_ids] + position[p])`` of every token, packed.

    Args:
        input_ids: (B, S) int64 or int32, rows of ``word``; checked at padding too.
        attention_mask: (B, S) bool or integer, 1 (token) or 0 (padding), any pattern; None: all are tokens.
        token_type_ids: (B, S) int64 or int32, rows of ``type``; None: its row 0.
        word, type, position: (V, E), (K, E), (P, E) floating, of one dtype.
        norm_weight, norm_bias: (E,) of the same dtype, of the layer norm.
        eps: of the layer norm, added to the variance.
        padding_idx: None: ``p`` is the column. Else positions count as RoBERTa's do: ``padding_idx`` plus the
            number of ids in the row so far that are not ``padding_idx``, and ``padding_idx`` where the id is.

    Returns:
        :class:`~dynplan.ops.Packed`, rows of width E; sizes as of :func:`~dynplan.ops.pack`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; a mask entry other than 0 and 1.
        IndexError: an id or a position outside its table.
    """
    if word.device.type == "cpu" and word.dtype == torch.float32 and not torch.is_grad_enabled():
        return Packed(
            *_embed_tokens(
                input_ids,
                attention_mask,
                token_type_ids,
                word,
                type,
                position,
                norm_weight,
                norm_bias,
                eps,
                padding_idx,
            )
        )
    check_inputs("embed_tokens", input_ids, attention_mask, word, position, padding_idx)
    batch_size, length = input_ids.shape
    embedded = F.embedding(input_ids, word)
    embedded = embedded + (type[0] if token_type_ids is None else F.embedding(token_type_ids, type))
    if padding_idx is None:
        embedded = embedded + position.narrow(0, 0, length)
    else:
        is_text = (input_ids != padding_idx).int()
        embedded = embedded + F.embedding(
            is_text.cumsum(1, dtype=torch.int32) * is_text + padding_idx, position
        )
    embedded = F.layer_norm(embedded, norm_weight.shape, norm_weight, norm_bias, eps)
    if attention_mask is not None:
        return pack(embedded, attention_mask)
    places = torch.arange(batch_size * length, dtype=torch.int32, device=embedded.device)
    offsets = torch.arange(batch_size + 1, dtype=torch.int32, device=embedded.device) * length
    return Packed(embedded.flatten(0, 1), places, offsets)


def check_inputs(op, input_ids, attention_mask, word, position, padding_idx) -> None:
    """What every op that embeds asks for, as the compiled ops word it."""
    torch._check_value(
        input_ids.dim() == 2,
        lambda: f"{op}: expected input_ids to have shape (B, S), got {list(input_ids.shape)}",
    )
    if attention_mask is not None:
        torch._check_value(
            attention_mask.shape == input_ids.shape,
            lambda: (
                f"{op}: expected attention_mask to have shape {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            ),
        )
    torch._check_value(
        word.dim() == 2,
        lambda: f"{op}: expected word to have shape (V, E), got {list(word.shape)}",
    )
    torch._check_value(
        padding_idx is None or 0 <= padding_idx < position.shape[0],
        lambda: f"{op}: expected padding_idx to be within 0..{position.shape[0] - 1}, got {padding_idx}",
    )


@torch.library.register_fake("dynplan::embed_tokens")
def _embed_tokens_fake(
    input_ids, attention_mask, token_type_ids, word, type, position, norm_weight, norm_bias, eps, padding_idx
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs("embed_tokens", input_ids, attention_mask, word, position, padding_idx)
    tokens = input_ids.numel() if attention_mask is None else torch.library.get_ctx().new_dynamic_size()
    int32 = {"dtype": torch.int32}
    return (
        word.new_empty((tokens, word.shape[1])),
        input_ids.new_empty((tokens,), **int32),
        input_ids.new_empty((input_ids.shape[0] + 1,), **int32),
    )
