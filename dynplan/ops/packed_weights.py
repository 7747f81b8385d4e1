"""Weights of encoder layers in the layout of the kernels, and whether they are still the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dynplan._C import dicts_are, weights_are_unchanged
from dynplan.ops.conditional_encoder_layer import EncoderLayerWeights, pack_encoder_weights
from dynplan.ops.reduced_encoder import pack_reduced_encoder_weights


class Watched:
    """Tensors that may change: they have not if they lie where they lay, with the version they had and with a
    few of their elements.

    Elements tell of dense writes that PyTorch keeps no record of: through ``parameter.data``, by fused
    optimizers, by other processes. They are looked at on the CPU only.

    Args:
        tensors: of any device and dtype; those of other kinds than PyTorch's own are left out.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensor for tensor in tensors if is_plain(tensor))
        self._dicts = tuple(map(vars, self._tensors))
        self._watch = torch.classes.dynplan.WeightWatch(list(self._tensors))
        self._handle = self._watch.handle()

    def unchanged(self) -> bool:
        """Whether all are as they were when this was made."""
        return dicts_are(self._tensors, self._dicts) and weights_are_unchanged(self._handle)


def is_plain(tensor: object) -> bool:
    """Whether a tensor has its numbers where PyTorch's own kernels would look for them."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def pack_layer(tensors: Sequence[Tensor], dtype: str | None) -> Tensor:
    """One layer's weights as the kernels read them; float16 becomes float32 on the CPU, which packs none.

    Args:
        tensors: weight and bias of query, key, value, output, first norm, up, down, second norm.
        dtype: "int8" or "bfloat16": of ``pack_reduced_encoder_weights``; None: of ``pack_encoder_weights``.
    """
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].is_cpu and tensors[0].dtype == torch.float16:
        tensors = [tensor.float() for tensor in tensors]
    (wq, bq, wk, bk, wv, bv), rest = tensors[:6], tensors[6:]
    weights = EncoderLayerWeights(torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv)), *rest)
    return pack_encoder_weights(weights) if dtype is None else pack_reduced_encoder_weights(weights, dtype)
