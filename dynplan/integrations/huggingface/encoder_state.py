"""What an encoder was read to be, for as long as it stays that: the cache of every fast way through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynplan.integrations.huggingface.families import Family, LayerParts, activation_of
from dynplan.ops.packed_weights import Watched, is_plain, pack_layer
from dynplan.snapshot import (
    ModuleSnapshot,
    has_backward_hooks,
    is_library_code,
    own_forward,
    process_reason,
)

GRADIENTS = "gradients are recorded; wrap inference in torch.no_grad()"
READS_PADDING = "the head reads padding, of which this batch has some"
_UNKNOWN = "the layers of {} are none that the kernels know"
# Where the ops run.
DEVICES = ("cpu", "cuda")
# Attention that is softmax(QK^T)V whatever its name says of how. A user's own is left to the layers.
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_ELEMENTWISE = tuple(
    getattr(nn, name) for name in "ReLU ReLU6 GELU SiLU Tanh Sigmoid ELU SELU LeakyReLU Mish".split()
)
# Adapters that treat each token by itself, so that packed rows will do.
_ADAPTER_PARTS = (nn.Linear, nn.Dropout, nn.Identity, nn.ModuleDict, nn.ParameterDict)
_ADAPTERS = ("peft.tuners.lora", "peft.tuners.ia3", "peft.tuners.adalora")

# Tensors that stand for plain ones while a program is recorded.
_RECORDED = (FakeTensor, FunctionalTensor)


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
        family: of the model.
        layers: the present ones, in the order of their calls.
        why_not_packed: why packed rows cannot go through the layers' own modules; None: they can.
        why_not_fused: why the kernels cannot stand for the layers; None: they can.
        embeddings: arguments of ``embed_tokens`` from its tables on, where it can stand for the embeddings.
        why_refused: why no forward at all would be right.
    """

    def __init__(self, model: nn.Module, family: Family, weights: str | None, traced: bool = False) -> None:
        self.family = family
        self.layers = list(family.layers_of(model))
        self.stack = getattr(model, family.stack[0], None)
        embeddings = getattr(model, family.embeddings, None)
        path = family.layers.split(".")
        owners = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
        self.projection = getattr(model, family.projection or "", None)
        self.pooler = getattr(model, "pooler", None)
        parts = [*owners]
        for root in (embeddings, *self.layers, self.projection, self.pooler):
            parts += [] if root is None else root.modules()
        configs = [config for part in parts if (config := getattr(part, "config", None)) is not None]
        configs = {id(config): config for config in configs}
        settings = [
            (vars(config), name)
            for config in configs.values()
            for name in ("_attn_implementation_internal", "num_hidden_layers", *family.refused)
        ]
        self._names = {config._attn_implementation for config in configs.values()}
        mappings = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        tables = [table for one in mappings for table in (one._global_mapping, one._local_mapping)]
        registered = [(table, name) for table in tables for name in self._names if name]
        # Before anything is read: what another thread writes meanwhile shall be seen.
        called = () if family.parts is None else family.parts.functions
        functions = [(vars(family.code), name) for name in called]
        self._modules = ModuleSnapshot(parts, [*settings, *registered, *functions])
        tensors = [parameter for layer in self.layers for parameter in layer.parameters()]
        self._tensors = (
            None if traced else Watched([*tensors, *(() if embeddings is None else embeddings.buffers())])
        )
        self._weights = weights
        self._packed: list[Tensor] | None = None
        self._why_not_by_sample: tuple[str | None] | None = None

        self.why_refused = _reason(_check_model, model, family)
        self.why_not_fused = _reason(self._check_packed, family)
        # Kernels record no gradients, so that these are nothing to them.
        self.why_not_packed = self.why_not_fused or _reason(_check_backward_hooks, self.layers)
        self.reading: LayerReading | None = None
        if self.why_not_fused is None:
            self.why_not_fused = _reason(self._read_layers, family)
        self.embeddings: tuple | None = None
        if not traced and family.embedding_parts is not None:
            _reason(self._read_embeddings, embeddings, family)

    def holds(self) -> bool:
        """Whether the model is as it was read."""
        return self._modules.holds() and self._tensors.unchanged()

    def why_not_by_sample(self) -> str | None:
        """Why a layer may mind who else is in its batch; None: it treats each sample by itself."""
        if self._why_not_by_sample is None:
            self._why_not_by_sample = (_reason(self._check_by_sample),)
        return self._why_not_by_sample[0]

    def packed(self) -> list[Tensor]:
        """Each layer's weights as the kernels read them; only where nothing is :attr:`why_not_fused`."""
        packed = self._packed
        if packed is None:
            packed = self._packed = [pack_layer(tensors, self._weights) for tensors in self._layer_tensors]
        return packed

    def _check_calls(self) -> None:
        if (reason := process_reason()) is not None:
            raise Differs(reason)
        if len(self._names) > 1:  # one's mask may mean nothing to another
            raise Differs(f"attention is of several implementations: {sorted(map(str, self._names))}")
        for name in self._names:
            functions = (ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name))
            own = all(function is None or is_library_code(function) for function in functions)
            if not own or name not in _ATTENTION:
                raise Differs(f"attention is {name!r}, which the kernels do not know")

    def _check_by_sample(self) -> None:
        self._check_calls()
        for layer in self.layers:
            for module in layer.modules():
                _expect(module, type(module), "a part of a layer")
                if has_backward_hooks(module):
                    raise Differs(f"{type(module).__name__} has a backward hook")
                if isinstance(module, _BatchNorm):
                    raise Differs("a layer norms over the batch")

    def _check_packed(self, family: Family) -> None:
        if family.parts is None:
            raise Differs(_UNKNOWN.format(family.prefix + family.bare))
        self._check_calls()
        _expect(self.stack, family.named(family.stack[1]), family.stack[0])
        if self.pooler is not None:  # another one may read padding
            _expect(self.pooler, family.named("Pooler"), "the pooler")
        for name in family.parts.functions:
            if not is_library_code(getattr(family.code, name)):
                raise Differs(f"{name} of {family.code.__name__} is not as transformers wrote it")
        for index, layer in enumerate(self.layers):
            try:
                _check_layer(layer, family)
            except Differs as reason:
                raise Differs(f"layer {index}: {reason}") from None

    def _read_layers(self, family: Family) -> None:
        if family.parts.bias is not None:
            raise Differs(f"{_UNKNOWN.format(family.prefix + family.bare)}: attention has a position bias")
        readings = [_read_layer(layer, family) for layer in self.layers]
        self._layer_tensors = [reading.tensors for reading in readings]
        if not readings:
            raise Differs("there are no layers")
        first = self.reading = readings[0]
        shapes = {(one.num_heads, one.activation, one.eps, int(one.tensors[10].shape[0])) for one in readings}
        if len(shapes) > 1:
            raise Differs("layers differ in heads, activation, eps or feed-forward width")
        kinds = {(tensor.dtype, tensor.device) for tensors in self._layer_tensors for tensor in tensors}
        if len(kinds) > 1:
            raise Differs("weights are of several dtypes or on several devices")
        if self._weights is not None and not first.tensors[0].is_cpu:
            raise Differs(f"weights are on {first.tensors[0].device}")

    def _read_embeddings(self, module: nn.Module, family: Family) -> None:
        parts = family.embedding_parts
        _expect(module, family.named("Embeddings"), "embeddings")
        if self.projection is not None:
            _expect(self.projection, nn.Linear, "the projection of the embeddings")
        names = (parts.word, parts.token_type, parts.position)
        tables = [None if name is None else getattr(module, name) for name in names]
        for table in filter(None, tables):
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
        positions, token_types = module.get_buffer(parts.positions), getattr(module, parts.token_types, None)
        if positions.is_meta:
            raise Differs("positions hold nothing")
        padding_idx = None
        if parts.padding_idx is not None:
            padding_idx = getattr(module, parts.padding_idx)
            if not isinstance(padding_idx, int):
                raise Differs("positions count from no padding_idx")
        elif not torch.equal(
            positions.cpu(), torch.arange(positions.shape[-1], device="cpu").expand_as(positions)
        ):
            raise Differs("positions are not columns")
        if token_types is not None and token_types.any():
            raise Differs("token types of a forward without any are not zeros")
        # Adding a row of zeros is adding nothing.
        weights = [
            norm.weight.new_zeros(1, len(norm.weight)) if one is None else one.weight for one in tables
        ]
        tensors = [*weights, norm.weight, norm.bias]
        if not all(map(is_plain, tensors)):
            raise Differs("an embedding table is a tensor of another kind")
        self.embeddings = (*tensors, norm.eps, padding_idx)


def _reason(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except Differs as reason:
        return str(reason)
    return None


def _check_model(model: nn.Module, family: Family) -> None:
    """Raises where no forward of ours is the model's."""
    bare = family.named(family.bare)
    if bare is None or type(model).forward is not bare.forward or not is_library_code(bare.forward):
        raise Differs(
            f"expected {family.prefix}{family.bare}'s own forward, got another of {type(model).__name__}"
        )
    for name, reason in family.refused.items():
        if getattr(model.config, name, None):
            raise Differs(f"expected config.{name} to be False, got True; {reason}")
    for layer in family.layers_of(model) if family.parts is not None else ():
        position = getattr(_find(layer, family.parts.attention), "position_embedding_type", "absolute")
        if position != "absolute":
            raise Differs(f"expected absolute position embeddings, got {position!r}")


def _find(layer: nn.Module, path: str) -> object:
    """What stands at a path, module or not; None if nothing does."""
    for name in path.split(".") if path else ():
        layer = getattr(layer, name, None)
    return layer


def _expect(module: nn.Module, kind: type | None, where: str) -> None:
    if not own_forward(module, kind):
        raise Differs(
            f"{where}: expected {getattr(kind, '__name__', kind)} with its own forward and without hooks, "
            f"got {type(module).__name__}"
        )


def _check_backward_hooks(layers: list[nn.Module]) -> None:
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if has_backward_hooks(module):
                raise Differs(f"layer {index}: {type(module).__name__} has a backward hook")


def _check_layer(layer: nn.Module, family: Family) -> None:
    """Raises unless packed rows can go through the layer's own modules, each sample's attention apart."""
    parts = family.parts
    for path, suffix in parts.classes.items():
        _expect(_find(layer, path), family.named(suffix), path or "the layer")
    attention = _find(layer, parts.attention)
    if parts.functions:  # else the attention is written in its module
        if attention.scaling != attention.attention_head_size**-0.5:
            raise Differs(f"attention is scaled by {attention.scaling}")
        # Without the attribute, attention that is handed on to PyTorch may be taken for a decoder's.
        causal = getattr(attention, "is_causal", attention.config._attn_implementation != "eager")
        if causal is not False:
            raise Differs("attention is causal")
    for path in parts.linears:
        module = _find(layer, path)
        if not type(module).__module__.startswith(_ADAPTERS):
            _expect(module, nn.Linear, path)
        elif not all(map(_is_part_of_adapter, module.modules())):
            raise Differs(f"{path}: its adapter has a hook or a part that may look at more than one token")
    for path in parts.norms:
        _expect(_find(layer, path), nn.LayerNorm, path)
        if len(_find(layer, path).normalized_shape) != 1:
            raise Differs(f"{path} is over several dimensions")
    for path in parts.dropouts:
        _expect(_find(layer, path), nn.Dropout, path)
    activation = _find(layer, parts.activation)
    _expect(activation, type(activation), parts.activation)
    if type(activation) not in _ELEMENTWISE and type(activation).__module__ != "transformers.activations":
        raise Differs(f"activation is {type(activation).__name__}, which may look at more than one number")


def layer_tensors(layer: nn.Module, parts: LayerParts) -> tuple[Tensor, ...]:
    """A layer's weights and biases, in the order of :attr:`LayerReading.tensors`."""
    paths = (*parts.linears[:4], parts.norms[0], *parts.linears[4:], parts.norms[1])
    modules = [_find(layer, path) for path in paths]
    return tuple(tensor for module in modules for tensor in (module.weight, module.bias))


def _is_part_of_adapter(module: nn.Module) -> bool:
    plain = type(module) in _ADAPTER_PARTS or type(module).__module__.startswith("peft.")
    return plain and own_forward(module, type(module))


def _read_layer(layer: nn.Module, family: Family) -> LayerReading:
    """The layer as the kernels take it.

    Raises:
        Differs: they cannot.
    """
    parts = family.parts
    attention = _find(layer, parts.attention)
    linears = [_find(layer, path) for path in parts.linears]
    norms = [_find(layer, path) for path in parts.norms]
    activation = activation_of(_find(layer, parts.activation))
    if activation is None:
        raise Differs(f"activation is {type(_find(layer, parts.activation)).__name__}")
    if any(type(linear) is not nn.Linear for linear in linears):
        raise Differs("a linear module has an adapter")
    on = [path for path in (parts.attention, *parts.dropouts) if _find(layer, path).training]
    if on:
        raise Differs(f"{on[0]} is in training mode")
    if norms[0].eps != norms[1].eps:
        raise Differs("its norms differ in eps")
    inside, outside = (int(linears[index].weight.shape[0]) for index in (0, 3))  # a trace's sizes are tensors
    heads, rest = divmod(inside, attention.attention_head_size)
    if rest or inside != outside:
        raise Differs("attention is narrower or wider than the layer")
    tensors = layer_tensors(layer, parts)
    if not all(is_plain(tensor) or type(tensor) in _RECORDED for tensor in tensors):
        raise Differs("a weight or bias is missing or a tensor of another kind")
    if not tensors[0].is_floating_point() or tensors[0].dtype == torch.float64:
        raise Differs(f"weights are {tensors[0].dtype}")
    if tensors[0].device.type not in DEVICES:
        raise Differs(f"weights are on {tensors[0].device}")
    return LayerReading(heads, activation, norms[0].eps, tensors)
