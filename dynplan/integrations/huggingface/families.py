"""Where things are in the encoders of transformers: a row per family.

No other file knows the name of a class or of an attribute of theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

_ACTIVATIONS = {
    type(ACT2FN[name]): name for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
} | {nn.SiLU: "silu"}


def activation_of(module: nn.Module) -> str | None:
    """The kernels' name for what an activation module computes; None: they do not know it."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[module.approximate]
    act = vars(module).get("act")
    if act is None or act is F.gelu or (getattr(act, "func", None), getattr(act, "keywords", 0)) == _TANH:
        return _ACTIVATIONS.get(type(module))
    return None


_TANH = (F.gelu, {"approximate": "tanh"})


@dataclass(frozen=True)
class LayerParts:
    """An encoder layer's parts, by their paths from the layer on.

    Attributes:
        classes: path -> suffix of its class: the modules whose own forwards the kernels stand for.
        attention: the module that knows heads, scaling and the dropout of the attention weights.
        linears: query, key, value, output, up, down.
        norms: after attention, after the feed-forward.
        activation: of the feed-forward.
        dropouts: of both residual branches.
        functions: of the family's code, that its layers call.
        forward: ``(layer, rows, attend)``: the layer by its own modules on rows ``(N, H)``, where
            ``attend(query, key, value)`` is attention inside each sequence.
    """

    classes: Mapping[str, str]
    attention: str
    linears: tuple[str, ...]
    norms: tuple[str, str]
    activation: str
    dropouts: tuple[str, ...]
    functions: tuple[str, ...]
    forward: Callable[[nn.Module, Tensor, Callable[..., Tensor]], Tensor]


@dataclass(frozen=True)
class EmbeddingParts:
    """What the embeddings module is made of.

    Attributes:
        word, token_type, position, norm, dropout: names of its parts.
        positions, token_types: buffers that a forward without such arguments reads.
        padding_idx: attribute that positions count from, as RoBERTa's do; None: they are columns.
    """

    word: str = "word_embeddings"
    token_type: str = "token_type_embeddings"
    position: str = "position_embeddings"
    norm: str = "LayerNorm"
    dropout: str = "dropout"
    positions: str = "position_ids"
    token_types: str = "token_type_ids"
    padding_idx: str | None = None


def _post_norm(layer: nn.Module, rows: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    attention = layer.attention.self
    context = attend(attention.query(rows), attention.key(rows), attention.value(rows))
    attended = layer.attention.output(context, rows)
    return layer.output(layer.intermediate(attended), attended)


BERT_LAYER = LayerParts(
    classes={
        "": "Layer",
        "attention": "Attention",
        "attention.self": "SelfAttention",
        "attention.output": "SelfOutput",
        "intermediate": "Intermediate",
        "output": "Output",
    },
    attention="attention.self",
    linears=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    activation="intermediate.intermediate_act_fn",
    dropouts=("attention.output.dropout", "output.dropout"),
    functions=("eager_attention_forward", "apply_chunking_to_forward"),
    forward=_post_norm,
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        prefix: of its class names.
        module: of its code, below ``transformers.models``.
        attribute: name of the bare model inside one with a head.
        heads: suffix of a class with a head -> whether that head itself reads the first position.
        stack: name of the module that runs the layers, and of its class's suffix; its list of layers.
        parts: of a layer.
        embeddings: name of that module; its parts.
        projection: name of a linear map between embeddings and layers, where a model has one.
    """

    prefix: str
    module: str
    attribute: str
    heads: Mapping[str, bool]
    stack: tuple[str, str] = ("encoder", "Encoder")
    layers: str = "layer"
    parts: LayerParts = BERT_LAYER
    embeddings: str = "embeddings"
    embedding_parts: EmbeddingParts = field(default_factory=EmbeddingParts)
    projection: str | None = None

    @property
    def bare(self) -> str:
        """Class name of the model without a head."""
        return f"{self.prefix}Model"

    @property
    def code(self) -> ModuleType:
        """Where transformers has it."""
        return importlib.import_module(f"transformers.models.{self.module}")

    def named(self, suffix: str) -> type | None:
        """The family's own class of that suffix; None where somebody has put another one there."""
        kind = getattr(self.code, f"{self.prefix}{suffix}", None)
        return kind if getattr(kind, "__module__", None) == self.code.__name__ else None

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The layers of a bare model."""
        return getattr(getattr(model, self.stack[0]), self.layers)


_FIRST = {"ForSequenceClassification": True, "ForTokenClassification": False}
_POOLED = {"ForSequenceClassification": False, "ForTokenClassification": False}
_ROBERTA = EmbeddingParts(padding_idx="padding_idx")
FAMILIES = (
    Family("Bert", "bert.modeling_bert", "bert", _POOLED),
    Family("Roberta", "roberta.modeling_roberta", "roberta", _FIRST, embedding_parts=_ROBERTA),
    Family("XLMRoberta", "xlm_roberta.modeling_xlm_roberta", "roberta", _FIRST, embedding_parts=_ROBERTA),
    Family("Electra", "electra.modeling_electra", "electra", _FIRST, projection="embeddings_project"),
)


def find_family(model: nn.Module) -> tuple[Family, str] | None:
    """The family of a model and the suffix of its class, "Model" for a bare one; None: no supported class is
    among its bases."""
    for kind in type(model).__mro__:
        for family in FAMILIES:
            if kind.__module__ == f"transformers.models.{family.module}" and kind.__name__.startswith(
                family.prefix
            ):
                suffix = kind.__name__.removeprefix(family.prefix)
                if suffix == "Model" or suffix in family.heads:
                    return family, suffix
    return None
