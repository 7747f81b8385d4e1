"""What an encoder was read to be, for as long as it stays that: the one cache of every fast way through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from transformers.modeling_utils import AttentionInterface

from dynplan.integrations.huggingface.families import Family, LayerParts, activation_of
from dynplan.integrations.huggingface.snapshot import ModuleSnapshot, has_backward_hooks, own_forward
from dynplan.ops.packed_weights import PackedWeights

# Attention that is softmax(QK^T)V whatever its name says of how. A user's own is left to the layers.
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Adapters that treat each token by itself, so that packed rows will do.
_ADAPTERS = ("peft.tuners.lora", "peft.tuners.ia3", "peft.tuners.adalora")

# Tensors of these types are what their dtype and shape say; the last two stand for others during export.
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


class Differs(Exception):
    """A module is not what the kernels, or packed rows, stand for; the text is the reason."""


@dataclass(frozen=True)
class LayerReading:
    """One layer's numbers and tensors, as the kernels take them.

    Attributes:
        num_heads, activation, eps: as for ``conditional_encoder``.
        tensors: weight and bias of query, key, value, output, first norm, up, down, second norm.
    """

    num_heads: int
    activation: str
    eps: float
    tensors: tuple[Tensor, ...]


class EncoderState:
    """A bare encoder as it was read.

    Args:
        model: the bare model.
        family: of it.
        weights: "int8" or "bfloat16": the type that products run in; None: the weights' own.
        traced: whether the tensors hold nothing just now: then no contents are looked at.

    Attributes:
        layers: the present ones.
        why_not_packed: why packed rows cannot go through the layers' own modules; None: they can.
        why_not_fused: why the kernels cannot stand for the layers; None: they can.
        embeddings: arguments of ``embed_tokens`` from its tables on, where it can stand for the embeddings.
        why_refused: why no forward at all would be right.
    """

    def __init__(self, model: nn.Module, family: Family, weights: str | None, traced: bool = False) -> None:
        self.layers = list(family.layers_of(model))
        self.stack = getattr(model, family.stack[0])
        embeddings = getattr(model, family.embeddings)
        parts = [model, self.stack, getattr(self.stack, family.layers)]
        for root in (embeddings, *self.layers, getattr(model, family.projection or "", None)):
            parts += [] if root is None else root.modules()
        configs = {
            id(config): config for config in (getattr(part, "config", None) for part in parts) if config
        }
        implementations = [(vars(config), "_attn_implementation_internal") for config in configs.values()]
        names = {table.get(name) for table, name in implementations}
        registered = [(AttentionInterface._global_mapping, name) for name in names if name]
        # Before anything is read: what another thread writes meanwhile shall be seen.
        self._modules = ModuleSnapshot(parts, [*implementations, *registered])
        if not traced:
            buffers = [embeddings.get_buffer(name) for name in _buffers_of(embeddings, family)]
            self._buffers = torch.classes.dynplan.WeightWatch(buffers)

        bare = family.named("Model")
        own = type(model).forward is bare.forward and bare.forward.__module__ == bare.__module__
        self.why_refused = None if own else f"{type(model).__name__} has a forward of its own"
        attention = [self._why_not_attention(name) for name in names]
        self.why_not_packed = next(filter(None, attention), None) or _reason(self._check_packed, family)
        self.why_not_fused = self.why_not_packed
        self.reading: LayerReading | None = None
        self.weights = PackedWeights(weights)
        if self.why_not_packed is None:
            self.why_not_fused = _reason(self._read_layers, family)
        self.projection = getattr(model, family.projection or "", None)
        self.embeddings: tuple | None = None
        if not traced:
            _reason(self._read_embeddings, embeddings, family)

    def holds(self) -> bool:
        """Whether the model is as it was read, weights aside: :meth:`packed` looks at those."""
        return self._modules.holds() and self._buffers.unchanged()

    def packed(self) -> list[Tensor]:
        """Each layer's weights as the kernels read them; only where nothing is :attr:`why_not_fused`."""
        return self.weights.get(self._tensors)

    @staticmethod
    def _why_not_attention(name: str | None) -> str | None:
        function = AttentionInterface._global_mapping.get(name)
        own = function is None or function.__module__.startswith("transformers.")
        return None if own and name in _ATTENTION else f"attention is {name!r}, which the kernels do not know"

    def _check_packed(self, family: Family) -> None:
        for index, layer in enumerate(self.layers):
            try:
                _check_layer(layer, family)
            except Differs as reason:
                raise Differs(f"layer {index}: {reason}") from None

    def _read_layers(self, family: Family) -> None:
        readings = [_read_layer(layer, family) for layer in self.layers]
        self._tensors = [reading.tensors for reading in readings]
        if not readings:
            raise Differs("there are no layers")
        first = self.reading = readings[0]
        for reading in readings[1:]:
            if (reading.num_heads, reading.activation, reading.eps) != (
                first.num_heads,
                first.activation,
                first.eps,
            ):
                raise Differs("layers differ in heads, activation or eps")
        kinds = {(tensor.dtype, tensor.device) for tensors in self._tensors for tensor in tensors}
        if len(kinds) > 1:
            raise Differs("weights are of several dtypes or on several devices")
        if self.weights.dtype is not None and not first.tensors[0].is_cpu:
            raise Differs(f"weights are on {first.tensors[0].device}")

    def _read_embeddings(self, module: nn.Module, family: Family) -> None:
        parts = family.embedding_parts
        _expect(module, family.named("Embeddings"), "embeddings")
        tables = [getattr(module, name) for name in (parts.word, parts.token_type, parts.position)]
        for table in tables:
            _expect(table, nn.Embedding, "embeddings")
            if table.max_norm is not None:
                raise Differs("an embedding table has max_norm")
        norm, dropout = getattr(module, parts.norm), getattr(module, parts.dropout)
        _expect(norm, nn.LayerNorm, "embeddings")
        _expect(dropout, nn.Dropout, "embeddings")
        if dropout.training:
            raise Differs("dropout of the embeddings is on")
        if norm.bias is None or len(norm.normalized_shape) != 1:
            raise Differs("the norm of the embeddings has no bias or several dimensions")
        positions, token_types = (
            getattr(module, name, None) for name in (parts.positions, parts.token_types)
        )
        padding_idx = None
        if parts.padding_idx is not None:
            padding_idx = getattr(module, parts.padding_idx)
            if not isinstance(padding_idx, int):
                raise Differs("positions count from no padding_idx")
        elif not torch.equal(positions.cpu(), torch.arange(positions.shape[-1]).expand_as(positions)):
            raise Differs("positions are not columns")
        if token_types is not None and token_types.any():
            raise Differs("token types of a forward without any are not zeros")
        tensors = [*(table.weight for table in tables), norm.weight, norm.bias]
        if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in tensors):
            raise Differs("an embedding table is a tensor of another kind")
        self.embeddings = (*tensors, norm.eps, padding_idx)


def _reason(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except Differs as reason:
        return str(reason)
    return None


def _buffers_of(module: nn.Module, family: Family) -> Iterator[str]:
    names = (family.embedding_parts.positions, family.embedding_parts.token_types)
    return (name for name in names if module._buffers.get(name) is not None)


def _expect(module: nn.Module, kind: type | None, where: str) -> None:
    if not own_forward(module, kind):
        raise Differs(
            f"{where}: expected {getattr(kind, '__name__', kind)} with its own forward and without hooks, "
            f"got {type(module).__name__}"
        )


def _check_layer(layer: nn.Module, family: Family) -> None:
    """Raises unless packed rows can go through the layer's own modules, each sample's attention apart."""
    parts = family.parts
    for module in layer.modules():
        if has_backward_hooks(module):
            raise Differs(f"{type(module).__name__} has a backward hook")
    for path, suffix in parts.classes.items():
        try:
            module = layer.get_submodule(path)
        except AttributeError as error:
            raise Differs(f"{path} is missing") from error
        _expect(module, family.named(suffix), path or "the layer")
    attention = layer.get_submodule(parts.attention)
    if attention.scaling != attention.attention_head_size**-0.5:
        raise Differs(f"attention is scaled by {attention.scaling}")
    if getattr(attention, "is_causal", False):
        raise Differs("attention is causal")
    for path in parts.linears:
        module = layer.get_submodule(path)
        if not type(module).__module__.startswith(_ADAPTERS):
            _expect(module, nn.Linear, path)
        elif any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
            raise Differs(f"{path}: its adapter has a hook")
    for path in parts.norms:
        _expect(layer.get_submodule(path), nn.LayerNorm, path)
        if len(layer.get_submodule(path).normalized_shape) != 1:
            raise Differs(f"{path} is over several dimensions")
    for path in parts.dropouts:
        _expect(layer.get_submodule(path), nn.Dropout, path)
    activation = layer.get_submodule(parts.activation)
    _expect(activation, type(activation), parts.activation)
    if not type(activation).__module__.startswith(
        ("torch.nn.modules.activation", "transformers.activations")
    ):
        raise Differs(f"activation is {type(activation).__name__}, which may look at more than one number")


def layer_tensors(layer: nn.Module, parts: LayerParts) -> tuple[Tensor, ...]:
    """A layer's weights and biases, in the order of :attr:`LayerReading.tensors`."""
    paths = (*parts.linears[:4], parts.norms[0], *parts.linears[4:], parts.norms[1])
    modules = [layer.get_submodule(path) for path in paths]
    return tuple(tensor for module in modules for tensor in (module.weight, module.bias))


def _read_layer(layer: nn.Module, family: Family) -> LayerReading:
    """The layer as the kernels take it.

    Raises:
        Differs: they cannot.
    """
    parts = family.parts
    attention = layer.get_submodule(parts.attention)
    linears = [layer.get_submodule(path) for path in parts.linears]
    norms = [layer.get_submodule(path) for path in parts.norms]
    activation = activation_of(layer.get_submodule(parts.activation))
    if activation is None:
        raise Differs(f"activation is {type(layer.get_submodule(parts.activation)).__name__}")
    if any(type(linear) is not nn.Linear for linear in linears):
        raise Differs("a linear module has an adapter")
    on = [path for path in (parts.attention, *parts.dropouts) if layer.get_submodule(path).training]
    if on:
        raise Differs(f"{on[0]} is in training mode")
    if norms[0].eps != norms[1].eps:
        raise Differs("its norms differ in eps")
    if attention.num_attention_heads * attention.attention_head_size != linears[3].out_features:
        raise Differs("attention is narrower or wider than the layer")
    tensors = layer_tensors(layer, parts)
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        raise Differs("a weight or bias is missing or a tensor of another kind")
    if not tensors[0].is_floating_point() or tensors[0].dtype == torch.float64:
        raise Differs(f"weights are {tensors[0].dtype}")
    if tensors[0].device.type not in ("cpu", "cuda"):
        raise Differs(f"weights are on {tensors[0].device}")
    return LayerReading(attention.num_attention_heads, activation, norms[0].eps, tensors)
