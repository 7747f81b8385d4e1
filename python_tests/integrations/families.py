"""Every family that can be swapped, as tiny random models: tests run over it, the docs' table is made of it.

A family of ``dynplan`` without a row here fails ``test_families.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from dynplan.integrations.huggingface.families import FAMILIES, Family

LENGTHS = (9, 3, 1, 7, 5)
PATHS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
_SHAPE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
TEXT = dict(_SHAPE, vocab_size=97, max_position_embeddings=40)
_IDS = dict(pad_token_id=1, bos_token_id=0, cls_token_id=0, eos_token_id=2, sep_token_id=2)
_IMAGE = dict(
    _SHAPE,
    image_size=16,
    patch_size=4,
    encoder_stride=4,
    num_labels=3,
)
_SOUND = dict(
    _SHAPE,
    vocab_size=20,
    conv_dim=(16, 16),
    conv_stride=(5, 4),
    conv_kernel=(10, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    apply_spec_augment=False,
    layerdrop=0.0,
    num_codevectors_per_group=8,
    codevector_dim=16,
    proj_codevector_dim=16,
    classifier_proj_size=16,
    tdnn_dim=(16, 16),
    tdnn_kernel=(3, 1),
    tdnn_dilation=(1, 1),
    xvector_output_dim=8,
    num_labels=3,
)


def text() -> dict[str, Tensor]:
    """Ids of 5 and above, padded on the right with id 1."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    ids = torch.randint(5, 96, mask.shape, generator=generator)
    return dict(input_ids=ids.where(mask.bool(), 1), attention_mask=mask)


def images() -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def sound() -> dict[str, Tensor]:
    return dict(input_values=torch.randn(5, 400, generator=torch.Generator().manual_seed(1)))


def spectra() -> dict[str, Tensor]:
    return dict(input_features=torch.randn(5, 8, 40, generator=torch.Generator().manual_seed(1)))


@dataclass(frozen=True)
class Tiny:
    """How to make and feed a tiny model of a family.

    Attributes:
        config: options of its configuration.
        inputs: makes a batch of five samples.
        unlike: end of a head's name -> why this table has no inputs for it.
    """

    config: dict
    inputs: Callable[[], dict[str, Tensor]] = text
    unlike: dict[str, str] = field(default_factory=dict)


_QUESTIONS = {"ForPreTraining": "needs question tokens", "ForQuestionAnswering": "needs question tokens"}
_UNLIKE_BEIT = {"ForSemanticSegmentation": "needs twelve layers", "ForMaskedImageModeling": "needs a mask"}
TINY = {
    "Bert": Tiny(TEXT),
    "Roberta": Tiny(TEXT | _IDS),
    "XLMRoberta": Tiny(TEXT | _IDS),
    "Electra": Tiny(TEXT | dict(embedding_size=16)),
    "Camembert": Tiny(TEXT | _IDS),
    "Data2VecText": Tiny(TEXT | _IDS),
    "DistilBert": Tiny(
        dict(vocab_size=97, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=40)
    ),
    "MPNet": Tiny(TEXT | _IDS),
    "BertGeneration": Tiny(TEXT | _IDS),
    "Ernie": Tiny(TEXT),
    "LayoutLM": Tiny(TEXT | dict(attn_implementation="eager")),
    "Splinter": Tiny(
        TEXT | dict(question_token_id=4),
        unlike=_QUESTIONS,
    ),
    "Xmod": Tiny(TEXT | _IDS | dict(languages=["en_XX", "de_DE"], default_language="en_XX")),
    "XLMRobertaXL": Tiny(TEXT | _IDS),
    "RobertaPreLayerNorm": Tiny(TEXT | _IDS),
    "DebertaV2": Tiny(
        TEXT
        | dict(
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        )
    ),
    "Deberta": Tiny(TEXT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "ModernBert": Tiny(TEXT | _IDS | dict(global_attn_every_n_layers=2, local_attention=4)),
    "NomicBert": Tiny(TEXT),
    "Gte": Tiny(TEXT),
    "JinaEmbeddingsV3": Tiny(TEXT),
    "EuroBert": Tiny(TEXT | _IDS | dict(num_key_value_heads=2, head_dim=8)),
    "Albert": Tiny(TEXT | dict(num_hidden_groups=2, embedding_size=16)),
    "Esm": Tiny(TEXT | dict(pad_token_id=1, mask_token_id=3, position_embedding_type="rotary")),
    "ViT": Tiny(_IMAGE),
    "DeiT": Tiny(_IMAGE),
    "Dinov2": Tiny(_IMAGE),
    "Beit": Tiny(
        _IMAGE,
        images,
        unlike=_UNLIKE_BEIT,
    ),
    "CLIPText": Tiny(TEXT | dict(eos_token_id=96, bos_token_id=0, projection_dim=16)),
    "CLIPVision": Tiny(_IMAGE | dict(projection_dim=16)),
    "SiglipText": Tiny(TEXT | dict(eos_token_id=96, bos_token_id=0)),
    "SiglipVision": Tiny(_IMAGE),
    "Wav2Vec2": Tiny(_SOUND, sound),
    "Hubert": Tiny(_SOUND, sound),
    "Whisper": Tiny(
        dict(
            d_model=32,
            encoder_layers=4,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=20,
            vocab_size=97,
            decoder_start_token_id=1,
            classifier_proj_size=16,
            num_labels=3,
        )
        | _IDS,
        spectra,
    ),
}
for _name in ("ViT", "DeiT", "Dinov2", "CLIPVision", "SiglipVision"):
    TINY[_name] = Tiny(TINY[_name].config, images)


def name_of(family: Family) -> str:
    """Of a family in this table."""
    return family.prefix + (family.bare.removesuffix("Model") if family.prefix in ("CLIP", "Siglip") else "")


def has_kernels(name: str) -> bool:
    """Whether the kernels know a family's layers."""
    return BY_NAME[name].has_kernels


def has_forward(name: str) -> bool:
    """Whether a forward of ours takes the place of the family's own, from the ids on."""
    return BY_NAME[name].embedding_parts is not None


BY_NAME = {name_of(family): family for family in FAMILIES}


def heads_of(name: str) -> list[str]:
    """Class names of all heads that a family's module has, those that generate text aside."""
    family = BY_NAME[name]
    bare = family.named(family.bare)
    found = []
    for each in sorted(vars(family.code)):
        kind = getattr(family.code, each)
        known = (
            isinstance(kind, type)
            and issubclass(kind, PreTrainedModel)
            and kind.__module__ == family.code.__name__
        )
        if known and each.startswith(family.prefix) and ("For" in each or "With" in each):
            if not issubclass(kind, GenerationMixin) and kind.config_class is bare.config_class:
                found.append(each)
    return [each for each in found if not each.endswith(tuple(TINY[name].unlike))]


def build(name: str, head: str | None = None, seed: int = 0, **options) -> nn.Module:
    """A random model in evaluation mode; all its parameters random, biases and norms too."""
    family = BY_NAME[name]
    kind = getattr(family.code, head or f"{family.prefix}{family.bare}")
    config = kind.config_class(**TINY[name].config, **options)
    torch.manual_seed(seed)
    model = kind(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim():
            mean = float("orm" in parameter_name and parameter_name.endswith("weight"))
            nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


def encoder_of(name: str, model: nn.Module) -> nn.Module:
    """The bare encoder in a model."""
    bare = BY_NAME[name].named(BY_NAME[name].bare)
    return next(part for part in model.modules() if isinstance(part, bare))


def alone(name: str, inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample of a batch, without its padding."""
    cut = {key: value[sample : sample + 1] for key, value in inputs.items()}
    if "attention_mask" in inputs:
        cut = {key: value[:, : LENGTHS[sample]] for key, value in cut.items()}
    return cut


def with_layers(name: str, model: nn.Module, path: Tensor) -> nn.Module:
    """A copy with the layers of a path, by the original classes; it shares no parameters with ``model``."""
    family, cut = BY_NAME[name], copy.deepcopy(model)
    bare = encoder_of(name, cut)
    layers = family.layers_of(bare)
    owner, _, attribute = family.layers.rpartition(".")
    kept = nn.ModuleList(layer for layer, wanted in zip(layers, path.tolist(), strict=True) if wanted)
    setattr(bare.get_submodule(owner), attribute, kept)
    if family.shared:
        bare.config.num_hidden_layers = bare.config.num_hidden_groups = len(kept)
    return cut


def table() -> str:
    """The table of ``docs/families.md``; ``test_families.py`` tests its every cell."""
    lines = [
        "| family | heads | fp32, bf16 | int8 weights | `torch.compile` | `torch.export` |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in BY_NAME.items():
        heads = [head.removeprefix(family.prefix) for head in heads_of(name)]
        kernels = "kernels" if has_kernels(name) else "own modules"
        cells = [
            f"`{family.prefix}{family.bare}`",
            ", ".join(f"`{head}`" for head in heads) or "-",
            kernels,
            "kernels" if has_kernels(name) else "refused",
            "one graph" if has_forward(name) else "graph break",
            "yes" if has_forward(name) else "refused",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
