"""Where things are in the encoders of transformers: a row per family.

No other file knows the name of a class or of an attribute of theirs.

A family whose row has neither parts nor embeddings still works: its model's own forward is run, and only the
calls of its layers are planned.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

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
        bias: ``(stack, hidden)`` -> ``(1, heads, S, S)``: what is added to all layers' scores, by how far
            apart the positions of ``hidden`` ``(B, S, H)`` are; None: nothing, which is what kernels know.
    """

    classes: Mapping[str, str]
    attention: str
    linears: tuple[str, ...]
    norms: tuple[str, str]
    activation: str
    dropouts: tuple[str, ...]
    functions: tuple[str, ...]
    forward: Callable[[nn.Module, Tensor, Callable[..., Tensor]], Tensor]
    bias: Callable[[nn.Module, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class EmbeddingParts:
    """What the embeddings module is made of.

    Attributes:
        word, token_type, position, norm, dropout: names of its parts; None: it has no token types.
        positions, token_types: buffers that a forward without such arguments reads.
        padding_idx: attribute that positions count from, as RoBERTa's do; None: they are columns.
    """

    word: str = "word_embeddings"
    token_type: str | None = "token_type_embeddings"
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


def _post_norm_of_distilbert(layer: nn.Module, rows: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    attention = layer.attention
    context = attend(attention.q_lin(rows), attention.k_lin(rows), attention.v_lin(rows))
    attended = layer.sa_layer_norm(attention.out_lin(context) + rows)
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


DISTILBERT_LAYER = LayerParts(
    classes={"": "TransformerBlock", "attention": "SelfAttention", "ffn": "FFN"},
    attention="attention",
    linears=(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    norms=("sa_layer_norm", "output_layer_norm"),
    activation="ffn.activation",
    dropouts=("ffn.dropout",),
    functions=("eager_attention_forward", "apply_chunking_to_forward"),
    forward=_post_norm_of_distilbert,
)


def _post_norm_of_mpnet(layer: nn.Module, rows: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    outer, inner = layer.attention, layer.attention.attn
    context = inner.o(attend(inner.q(rows), inner.k(rows), inner.v(rows)))
    attended = outer.LayerNorm(outer.dropout(context) + rows)
    return layer.output(layer.intermediate(attended), attended)


MPNET_LAYER = LayerParts(
    classes={
        "": "Layer",
        "attention": "Attention",
        "attention.attn": "SelfAttention",
        "intermediate": "Intermediate",
        "output": "Output",
    },
    attention="attention.attn",
    linears=(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    norms=("attention.LayerNorm", "output.LayerNorm"),
    activation="intermediate.intermediate_act_fn",
    dropouts=("attention.dropout", "output.dropout"),
    functions=(),
    forward=_post_norm_of_mpnet,
    bias=lambda stack, hidden: stack.compute_position_bias(hidden[:1]),
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        prefix: of its class names.
        module: of its code, below ``transformers.models``.
        bare: rest of the class name of the model without a head.
        stack: name of the module that runs the layers, and of its class's suffix.
        layers: path of the list of layers, from the bare model on.
        parts: of a layer; None: the kernels do not know it.
        embeddings: name of that module.
        embedding_parts: of it; None: the forward is the model's own, with its layers planned.
        projection: name of a linear map between embeddings and layers, where a model has one.
        output: of a forward of ours, without a pooler.
        shared: the list holds what the configuration's number of layers take turns with.
        outputs: of a layer, where it gives a tuple; 0: it gives a tensor.
        refused: setting of the configuration -> why no plan is right where it is on.
    """

    prefix: str
    module: str
    bare: str = "Model"
    stack: tuple[str, str] = ("encoder", "Encoder")
    layers: str = "encoder.layer"
    parts: LayerParts | None = None
    embeddings: str = "embeddings"
    embedding_parts: EmbeddingParts | None = None
    projection: str | None = None
    output: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
    shared: bool = False
    outputs: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels know its layers."""
        return self.parts is not None and self.parts.bias is None

    @property
    def code(self) -> ModuleType:
        """Where transformers has it."""
        return importlib.import_module(f"transformers.models.{self.module}")

    def named(self, suffix: str) -> type | None:
        """The family's own class of that suffix, or name; None where somebody has put another one there."""
        kind = getattr(self.code, f"{self.prefix}{suffix}", None) or getattr(self.code, suffix, None)
        return kind if getattr(kind, "__module__", None) == self.code.__name__ else None

    def layers_of(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of a bare model, in the order in which it calls them."""
        layers = model.get_submodule(self.layers)
        if not self.shared:
            return layers
        count = model.config.num_hidden_layers
        return [layers[int(index / (count / len(layers)))] for index in range(count)]


# Arguments of layers that hold a row for each sample.
PER_SAMPLE = frozenset(
    (
        "attention_mask",
        "src_key_padding_mask",
        "position_bias",
        "position_embeddings",
        "position_ids",
        "lang_ids",
    )
)
# What a head reads of a swapped encoder, by the end of its class's name: the first position, or each token by
# itself. All others may read padding.
READS = {
    "ForSequenceClassification": "first",
    "ForMultipleChoice": "first",
    "ForNextSentencePrediction": "first",
    "ForTokenClassification": "tokens",
    "ForMaskedLM": "tokens",
    "ForPreTraining": "tokens",
}
_CAUSAL = "a causal mask would make each token's work depend on its place"
_BERT_REFUSED = {
    "is_decoder": _CAUSAL,
    "add_cross_attention": "cross-attention is not planned",
    "is_causal": _CAUSAL,
}

_CONVOLUTION = {"conv_kernel_size": "a convolution follows the first layer, whoever takes it"}


def _bert(prefix: str, module: str, **options: Any) -> Family:
    options = {"parts": BERT_LAYER, "embedding_parts": EmbeddingParts(), "refused": _BERT_REFUSED, **options}
    return Family(prefix, module, **options)


_ROBERTA = EmbeddingParts(padding_idx="padding_idx")
FAMILIES = (
    _bert("Bert", "bert.modeling_bert"),
    _bert("Roberta", "roberta.modeling_roberta", embedding_parts=_ROBERTA),
    _bert("XLMRoberta", "xlm_roberta.modeling_xlm_roberta", embedding_parts=_ROBERTA),
    _bert("Electra", "electra.modeling_electra", projection="embeddings_project"),
    _bert("Camembert", "camembert.modeling_camembert", embedding_parts=_ROBERTA),
    _bert("Data2VecText", "data2vec.modeling_data2vec_text", embedding_parts=_ROBERTA),
    _bert(
        "DistilBert",
        "distilbert.modeling_distilbert",
        stack=("transformer", "Transformer"),
        layers="transformer.layer",
        parts=DISTILBERT_LAYER,
        embedding_parts=EmbeddingParts(token_type=None),
        output=BaseModelOutput,
        refused={},
    ),
    Family("MPNet", "mpnet.modeling_mpnet", parts=MPNET_LAYER, outputs=1),
    _bert(
        "BertGeneration",
        "bert_generation.modeling_bert_generation",
        bare="Encoder",
        stack=("encoder", "BertEncoder"),
        embedding_parts=None,
    ),
    _bert("Ernie", "ernie.modeling_ernie", embedding_parts=None),
    _bert("LayoutLM", "layoutlm.modeling_layoutlm", embedding_parts=None),
    _bert("Splinter", "splinter.modeling_splinter", embedding_parts=None),
    Family("Xmod", "xmod.modeling_xmod", refused=_BERT_REFUSED),
    Family("XLMRobertaXL", "xlm_roberta_xl.modeling_xlm_roberta_xl", refused=_BERT_REFUSED),
    Family(
        "RobertaPreLayerNorm", "roberta_prelayernorm.modeling_roberta_prelayernorm", refused=_BERT_REFUSED
    ),
    Family("DebertaV2", "deberta_v2.modeling_deberta_v2", outputs=2, refused=_CONVOLUTION),
    Family("Deberta", "deberta.modeling_deberta", outputs=2),
    Family("ModernBert", "modernbert.modeling_modernbert", layers="layers"),
    Family("NomicBert", "nomic_bert.modeling_nomic_bert", layers="layers"),
    Family("Gte", "gte.modeling_gte", layers="layers"),
    Family("JinaEmbeddingsV3", "jina_embeddings_v3.modeling_jina_embeddings_v3", layers="layers"),
    Family("EuroBert", "eurobert.modeling_eurobert", layers="layers"),
    Family("Albert", "albert.modeling_albert", layers="encoder.albert_layer_groups", shared=True),
    Family("Esm", "esm.modeling_esm", refused=_BERT_REFUSED),
    Family("ViT", "vit.modeling_vit", layers="layers"),
    Family("DeiT", "deit.modeling_deit", layers="layers"),
    Family("Dinov2", "dinov2.modeling_dinov2"),
    Family("Beit", "beit.modeling_beit", layers="layers"),
    Family("CLIP", "clip.modeling_clip", bare="TextModel", layers="encoder.layers"),
    Family("CLIP", "clip.modeling_clip", bare="VisionModel", layers="encoder.layers"),
    Family("Siglip", "siglip.modeling_siglip", bare="TextModel", layers="encoder.layers"),
    Family("Siglip", "siglip.modeling_siglip", bare="VisionModel", layers="encoder.layers"),
    Family("Wav2Vec2", "wav2vec2.modeling_wav2vec2", layers="encoder.layers"),
    Family("Hubert", "hubert.modeling_hubert", layers="encoder.layers"),
    Family("Whisper", "whisper.modeling_whisper", bare="Encoder", layers="layers"),
)


def find_class(name: str) -> type | None:
    """A class of a family by its name, where transformers itself does not offer it."""
    homes = (family.code for family in FAMILIES if name == f"{family.prefix}{family.bare}")
    return next((getattr(home, name) for home in homes if hasattr(home, name)), None)


def find_family(model: nn.Module) -> tuple[Family, nn.Module, str] | None:
    """The family of a model, its bare encoder and the suffix of its class; None: no class among its bases is
    a family's, or none with one bare encoder in it."""
    for kind in type(model).__mro__:
        for family in FAMILIES:
            if kind.__module__ == f"transformers.models.{family.module}" and kind.__name__.startswith(
                family.prefix
            ):
                suffix = kind.__name__.removeprefix(family.prefix)
                if suffix == family.bare:
                    return family, model, suffix
                bare = family.named(family.bare)
                inside = [child for child in model.children() if bare and isinstance(child, bare)]
                if (
                    isinstance(model, PreTrainedModel)
                    and ("For" in suffix or "With" in suffix)
                    and len(inside) == 1
                ):
                    return family, inside[0], suffix
    return None
