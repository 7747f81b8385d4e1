"""Weights of encoder layers in the layout of the kernels, packed again when the model's own change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynplan.ops.conditional_encoder_layer import EncoderLayerWeights, pack_encoder_weights
from dynplan.ops.reduced_encoder import pack_reduced_encoder_weights


class PackedWeights:
    """Packed weights of a stack of layers: a cache, asked before each forward.

    Weights count as unchanged where they lie where they lay, with the version they had and with a few of
    their elements. Elements tell of dense writes that PyTorch keeps no record of: through ``parameter.data``,
    by fused optimizers, by other processes. They are looked at on the CPU only.

    Args:
        dtype: "int8" or "bfloat16": of ``pack_reduced_encoder_weights``; None: of ``pack_encoder_weights``.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self._held: tuple[torch.ScriptObject, list[Tensor]] | None = None

    def get(self, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Packed weights per layer.

        Args:
            layers: each layer's tensors: weight and bias of query, key, value, output, first norm, up, down,
                second norm; the same objects at every call.
        """
        # Read once and written once, whole: another thread may come to the same conclusion meanwhile.
        held = self._held
        if held is None or not held[0].unchanged():
            # Before packing: what another thread writes meanwhile shall be seen.
            watch = torch.classes.dynplan.WeightWatch([tensor for layer in layers for tensor in layer])
            held = self._held = watch, [pack_layer(layer, self.dtype) for layer in layers]
        return held[1]

    def forget(self) -> None:
        """Pack anew at the next call, whatever is seen."""
        self._held = None


def pack_layer(tensors: Sequence[Tensor], dtype: str | None) -> Tensor:
    """One layer's weights as the kernels read them; float16 becomes float32 on the CPU, which packs none."""
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].is_cpu and tensors[0].dtype == torch.float16:
        tensors = [tensor.float() for tensor in tensors]
    (wq, bq, wk, bk, wv, bv), rest = tensors[:6], tensors[6:]
    weights = EncoderLayerWeights(torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv)), *rest)
    return pack_encoder_weights(weights) if dtype is None else pack_reduced_encoder_weights(weights, dtype)
