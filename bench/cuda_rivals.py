"""What a planned encoder on a GPU is compared with: Hugging Face's model, and loops over its layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel

Form = Callable[[], Tensor]


def padded(model: BertModel, inputs: dict[str, Tensor]) -> Form:
    """Hugging Face's own forward, attention by ``scaled_dot_product_attention``."""
    return lambda: model(**inputs).last_hidden_state


def compiled(model: BertModel, inputs: dict[str, Tensor]) -> Form:
    """The same through ``torch.compile`` at its best; every shape is compiled for itself."""
    torch.compiler.reset()
    fast = torch.compile(model, mode="max-autotune", dynamic=False)
    return lambda: fast(**inputs).last_hidden_state


def unpadded(model: BertModel, inputs: dict[str, Tensor], lengths: Tensor) -> Form:
    """Full depth on packed rows, with PyTorch's flash attention for sequences of any length.

    The places of the tokens are found once, outside of what is timed.
    """
    from torch.nn.attention.varlen import varlen_attn

    heads = model.config.num_attention_heads
    slots = inputs["attention_mask"].flatten().nonzero().squeeze(1)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int().to(slots.device)
    longest = int(lengths.max())
    shape = inputs["input_ids"].shape
    weights = []
    for layer in model.encoder.layer:
        parts = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        weights.append((torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])))

    def run() -> Tensor:
        hidden = model.embeddings(inputs["input_ids"]).flatten(0, 1).index_select(0, slots)
        for layer, (weight, bias) in zip(model.encoder.layer, weights, strict=True):
            q, k, v = F.linear(hidden, weight, bias).view(len(slots), 3, heads, -1).unbind(1)
            context = varlen_attn(q, k, v, offsets, offsets, longest, longest).flatten(1)
            hidden = layer.attention.output(context, hidden)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        whole = hidden.new_zeros(shape[0] * shape[1], hidden.shape[1])
        return whole.index_copy(0, slots, hidden).view(*shape, -1)

    return run


def naive(model: BertModel, inputs: dict[str, Tensor], keep: Tensor) -> Form:
    """What one writes first: pick each layer's samples by ``nonzero``, run it on them, put them back."""
    mask = inputs["attention_mask"].bool()[:, None, None, :]

    def run() -> Tensor:
        hidden = model.embeddings(inputs["input_ids"])
        for index, layer in enumerate(model.encoder.layer):
            kept = keep[:, index].nonzero().squeeze(1)
            if len(kept):
                output = layer(hidden.index_select(0, kept), mask.index_select(0, kept))
                output = output[0] if isinstance(output, tuple) else output
                hidden = hidden.index_copy(0, kept, output)
        return hidden

    return run
