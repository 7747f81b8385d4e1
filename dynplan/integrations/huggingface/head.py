"""A model's own head as the kernels take it: one linear map or two of the state in first position."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynplan.nn.exits import Exits
from dynplan.ops.packed_weights import Watched, is_plain
from dynplan.snapshot import ModuleSnapshot, has_hooks, own_forward, process_reason

# What a head may consist of beside transformers' own modules.
_PARTS = (nn.Linear, nn.Dropout, nn.Tanh, nn.GELU, nn.ReLU, nn.Identity)
_ACTIVATIONS = {"tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu}


class Head:
    """What a model's head was read to be, for as long as it and the exits stay that.

    Which maps a head consists of is found by rule: all linear modules beside the encoder's layers. That they
    are all that it does is seen by asking it.

    Args:
        whole: the model with its head.
        model: the bare model in it.
        exits: read with the head.
        answer: what the head itself answers, ``(B, H)`` -> ``(B, C)``.

    Attributes:
        tensors: weight and bias of each map; None: the head is more than that, or not float32 on the CPU.
        activation: between two maps; "none" where there is one.
    """

    def __init__(
        self, whole: nn.Module, model: nn.Module, exits: Exits, answer: Callable[[Tensor], Tensor]
    ) -> None:
        inside = set(model.modules())
        pooler = getattr(model, "pooler", None)
        own = [*(() if pooler is None else pooler.modules())]
        own += [module for module in whole.modules() if module not in inside]
        self.exits = exits
        modules = [*own, *exits.modules()]
        self._modules = ModuleSnapshot(modules)
        self._own = own
        self._training = [module.training for module in own]
        self._tensors = Watched(
            tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
        self.tensors: tuple[Tensor, ...] | None = None
        self.activation: str | None = "none"
        linears = [module for module in own if type(module) is nn.Linear]
        plain = all(map(_is_plain_part, own)) and not any(self._training) and process_reason() is None
        if not plain or not 1 <= len(linears) <= 2 or not _are_plain_exits(exits):
            return
        tensors = tuple(tensor for linear in linears for tensor in (linear.weight, linear.bias))
        read = [*tensors, *exits.parameters(), *exits.buffers()]
        if not all(map(_is_dense_float, read)) or tensors[0].shape[1] != exits.hidden_size:
            return
        if exits.regression != (len(tensors[-1]) == 1):
            return
        try:
            self.activation = _activation(tensors, answer)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return  # it is asked again where its answer counts, and explains itself there
        if self.activation is not None:
            self.tensors = tensors

    def holds(self, exits: Exits) -> bool:
        """Whether head and exits are as they were read."""
        return (
            exits is self.exits
            and self._modules.holds()
            and [module.training for module in self._own] == self._training
            and self._tensors.unchanged()
        )


def _is_plain_part(module: nn.Module) -> bool:
    """Whether a part of a head is of PyTorch's plain kinds, or of transformers', and no hook hangs on it."""
    kind = type(module)
    library = kind.__module__.startswith(("transformers.models.", "transformers.activations"))
    return (library or kind in _PARTS) and own_forward(module, kind)


def _are_plain_exits(exits: Exits) -> bool:
    """Whether exits and all their parts are of the very classes that they were built of."""
    networks = [] if exits.errors is None else [*exits.errors]
    if type(exits) is not Exits or any(
        [*map(type, one)] != [nn.Linear, nn.GELU, nn.Linear] for one in networks
    ):
        return False
    linears = [*exits.heads, *exits.certainty, *(part for one in networks for part in (one[0], one[2]))]
    return (
        all(own_forward(module, nn.Linear) for module in linears)
        and all(own_forward(one, nn.Sequential) and one[1].approximate == "none" for one in networks)
        and not has_hooks(exits)
        and vars(exits).keys().isdisjoint(("forward", "read", "sureness"))
        and all(own_forward(one[1], nn.GELU) for one in networks)
    )


def _activation(tensors: Sequence[Tensor], answer: Callable[[Tensor], Tensor]) -> str | None:
    """Between the maps, as the head's own answers tell; None: they tell of something else."""
    generator = torch.Generator("cpu").manual_seed(0)
    like = {"dtype": torch.float32, "device": "cpu"}
    probe = 3 * torch.randn(4, tensors[0].shape[1], generator=generator, **like)
    with torch.no_grad():
        told = answer(probe)
        inside = F.linear(probe, *tensors[:2])
        for name, function in _ACTIVATIONS.items() if len(tensors) == 4 else (("none", None),):
            given = inside if function is None else F.linear(function(inside), *tensors[2:])
            if (
                given.shape == told.shape
                and told.dtype == given.dtype
                and torch.allclose(given, told, rtol=1e-4, atol=1e-5)
            ):
                return name
    return None


def _is_dense_float(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and is_plain(tensor)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )
