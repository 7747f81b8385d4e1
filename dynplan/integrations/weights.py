"""Weights of Hugging Face layers in the layout of the kernels, packed again when the model's own change."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor, nn

from dynplan.integrations.places import Places
from dynplan.ops.conditional_encoder_layer import EncoderLayerWeights, pack_encoder_weights
from dynplan.ops.reduced_encoder import pack_reduced_encoder_weights

_SITES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


class PackedLayers:
    """Packed weights of a stack of post-norm encoder layers with Hugging Face BERT's submodules.

    A change is seen in a replaced module or parameter, in a parameter's storage or in its version counter:
    optimizer steps, ``load_state_dict``, ``.to()``, adapters. PyTorch keeps no record of a write in place
    through ``parameter.data``: make a new object after one.

    Args:
        dtype: "int8" or "bfloat16": of ``pack_reduced_encoder_weights``; None: of ``pack_encoder_weights``.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self.stack: PackedStack | None = None

    def get(self, layers: list[nn.Module]) -> list[Tensor] | None:
        """Packed weights per layer, or None where a submodule is not plain (an adapter, a hook)."""
        # Read once and written once, whole: another thread may come to the same conclusion meanwhile.
        stack = self.stack
        if stack is None or stack.layers != layers or not stack.holds():
            stack = self.stack = PackedStack(layers, stack, self.dtype)
        return stack.packed


class PackedStack:
    """What a stack of layers was made of when its weights were packed.

    The check runs at every forward, over some 27 entries and 16 tensors per layer. After one short text's
    forward nothing of theirs is left in cache, so it is made in C++: 0.3 ms through Python, 0.06 there.

    Attributes:
        packed: blobs per layer, or None where a submodule is not plain.
        places: where the layers' modules and parameters stand.
        tensors: all parameters.
    """

    def __init__(self, layers: list[nn.Module], before: PackedStack | None, dtype: str | None) -> None:
        self.layers = layers
        self.places = Places()
        self.seen = [_Seen(layer, self.places) for layer in layers]
        self.tensors = [tensor for seen in self.seen for tensor in seen.tensors]
        self.packed = None
        self._plain = all(seen.plain for seen in self.seen)
        if not self._plain:
            return
        old = (
            {}
            if before is None or before.packed is None
            else dict(zip(before.layers, before.seen, strict=True))
        )
        # Before packing: what another thread writes meanwhile shall be noticed.
        self._watch = torch.classes.dynplan.WeightWatch(self.tensors)
        self._entries = self.places.watch()
        self.packed = []
        for layer, seen in zip(layers, self.seen, strict=True):
            seen.pack(old.get(layer), dtype)
            self.packed.append(seen.blob)

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return self._plain and self._entries.same() and self._watch.unchanged()


class _Seen:
    """One layer's modules, parameters and their state."""

    def __init__(self, layer: nn.Module, places: Places) -> None:
        self.tensors = []
        self.plain = True
        for path in _SITES:
            module = layer
            for name in path.split("."):
                module = places.stay(module._modules, name)
            wanted = nn.LayerNorm if path.endswith("LayerNorm") else nn.Linear
            self.plain &= type(module) is wanted and "forward" not in vars(module)
            self.plain &= not (module._forward_hooks or module._forward_pre_hooks)
            places.without_hooks(module)
            for name in ("weight", "bias"):
                tensor = places.stay(module._parameters, name)
                self.plain &= tensor is not None
                self.tensors.append(tensor)
        if self.plain:
            self.versions = [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]
            self.addresses = [tensor.data_ptr() for tensor in self.tensors]

    def pack(self, before: _Seen | None, dtype: str | None) -> None:
        """Pack the weights, or take over what was packed ``before`` if they are the same."""
        if (
            before is not None
            and all(map(is_, before.tensors, self.tensors))
            and (before.versions, before.addresses) == (self.versions, self.addresses)
        ):
            self.blob, self._aliases = before.blob, before._aliases
            return
        # Aliases keep the storages alive, so that no new weights can come to lie at an address seen before.
        self._aliases = [tensor.detach() for tensor in self.tensors]
        (wq, bq, wk, bk, wv, bv), rest = self._aliases[:6], self._aliases[6:]
        wo, bo, norm1, shift1, up, bias_up, down, bias_down, norm2, shift2 = rest
        weights = EncoderLayerWeights(
            qkv_weight=torch.cat((wq, wk, wv)),
            qkv_bias=torch.cat((bq, bk, bv)),
            output_weight=wo,
            output_bias=bo,
            norm1_weight=norm1,
            norm1_bias=shift1,
            up_weight=up,
            up_bias=bias_up,
            down_weight=down,
            down_bias=bias_down,
            norm2_weight=norm2,
            norm2_bias=shift2,
        )
        if dtype is None:
            self.blob = pack_encoder_weights(weights)
        else:
            self.blob = pack_reduced_encoder_weights(weights, dtype)
