"""What :mod:`dynplan.ops.encode_tokens` computes."""

from types import SimpleNamespace

from torch import Tensor

from dynplan.reference.build_dispatch import build_dispatch
from dynplan.reference.conditional_encoder_layer import conditional_encoder_layer
from dynplan.reference.embed_tokens import embed_tokens
from dynplan.reference.pack import unpack


def encode_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    embeddings: tuple,
    keep: Tensor | None,
    weights: list,
    num_heads: int,
    activation: str,
    eps: float,
) -> Tensor:
    """``embeddings``: the arguments of ``embed_tokens`` from ``word`` on; ``weights``: of each layer, as
    ``conditional_encoder_layer`` takes them."""
    hidden, indices, cu_seqlens = embed_tokens(input_ids, attention_mask, token_type_ids, *embeddings)
    for layer, layer_weights in enumerate(weights):
        kept = input_ids.new_ones(len(input_ids)).bool() if keep is None else keep[:, layer]
        names = ("rows", "cu_seqlens", "counts")
        built = build_dispatch(kept, cu_seqlens, len(hidden))
        dispatch = SimpleNamespace(**dict(zip(names, built, strict=True)))
        hidden = conditional_encoder_layer(hidden, dispatch, layer_weights, num_heads, activation, eps)
    return unpack(hidden, indices, *input_ids.shape)
