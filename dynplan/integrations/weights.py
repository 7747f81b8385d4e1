"""Weights of Hugging Face layers in the layout of the kernels, packed again when the model's own change."""

from __future__ import annotations

import threading
from operator import attrgetter

import torch
from torch import Tensor, nn

from dynplan.ops.conditional_encoder_layer import EncoderLayerWeights, pack_encoder_weights

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

_VERSION = attrgetter("_version")


class LayerWeights:
    """One layer's packed weights.

    A change is seen in a replaced module or parameter, in a parameter's storage or in its version counter:
    optimizer steps, ``load_state_dict``, ``.to()``, adapters. PyTorch keeps no record of a write in place
    through ``parameter.data``: make a new object after one.

    Args:
        layer: a post-norm encoder layer with Hugging Face BERT's submodules.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._lock = threading.Lock()
        self._packed: tuple[_Seen, Tensor | None] | None = None

    def get(self) -> Tensor | None:
        """The packed weights, or None where a submodule is not the plain module it was (an adapter, a
        hook)."""
        packed = self._packed  # read once: another thread may pack anew meanwhile
        if packed is None or not packed[0].holds():
            with self._lock:
                packed = self._pack()
                self._packed = packed
        return packed[1]

    def _pack(self) -> tuple[_Seen, Tensor | None]:
        seen = _Seen(self.layer)
        if not seen.plain:
            return seen, None
        with torch.no_grad():
            weights = [tensor.detach() for tensor in seen.tensors]
            (wq, bq, wk, bk, wv, bv), rest = weights[:6], weights[6:]
            wo, bo, n1, m1, wu, bu, wd, bd, n2, m2 = rest
            fused = EncoderLayerWeights(
                torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv)), wo, bo, n1, m1, wu, bu, wd, bd, n2, m2
            )
            return seen, pack_encoder_weights(fused)


class _Seen:
    """What a layer was made of when its weights were packed."""

    def __init__(self, layer: nn.Module) -> None:
        self._links = []
        self._slots = []
        self._hooks = []
        self.plain = True
        for path in _SITES:
            module = layer
            for name in path.split("."):
                child = module._modules[name]
                self._links.append((module._modules, name, child))
                module = child
            wanted = nn.LayerNorm if path.endswith("LayerNorm") else nn.Linear
            self.plain &= type(module) is wanted and "forward" not in vars(module)
            self._hooks += (module._forward_hooks, module._forward_pre_hooks)
            for name in ("weight", "bias"):
                tensor = module._parameters.get(name)
                self.plain &= tensor is not None
                self._slots.append((module._parameters, name, tensor))
        self.plain &= not any(self._hooks)
        self.tensors = [tensor for _, _, tensor in self._slots]
        if self.plain:
            # A model made under inference_mode counts no versions.
            self._counted = not any(tensor.is_inference() for tensor in self.tensors)
            self._state = self._read()
            # Aliases keep the storages alive, so that no new weights can come to lie at an address seen
            # before.
            self._aliases = [tensor.detach() for tensor in self.tensors]

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        for table, name, tensor in self._slots:
            if table.get(name) is not tensor:
                return False
        for table, name, child in self._links:
            if table.get(name) is not child:
                return False
        return self.plain and not any(self._hooks) and self._state == self._read()

    def _read(self) -> tuple[list[int], list[int]]:
        # map over C functions: this runs at every forward, for 16 tensors of each layer.
        versions = list(map(_VERSION, self.tensors)) if self._counted else []
        return versions, list(map(Tensor.data_ptr, self.tensors))
