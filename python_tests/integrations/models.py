"""Tiny random models of every supported type, their inputs, and the oracle of a plan."""

import torch
import transformers
from torch import Tensor, nn

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
    num_labels=3,
)
KINDS = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", dict(pad_token_id=1)),
    "xlm-roberta": ("XLMRoberta", dict(pad_token_id=1)),
    "electra": ("Electra", dict(embedding_size=16)),
    "electra-unprojected": ("Electra", dict(embedding_size=32)),
}
TASKS = ("Model", "ForSequenceClassification", "ForTokenClassification")


def tiny(kind: str = "bert", task: str = "ForSequenceClassification", seed: int = 0, **options) -> nn.Module:
    """A random model in evaluation mode; all its parameters random, biases and norms too."""
    prefix, more = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **more, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}{task}")(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model


def batch(lengths=(9, 3, 1, 7, 5), side: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Random ids, 2 and above, and a mask; padding is id 1 on ``side``."""
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths, default=4)
    place = torch.arange(length)
    place = place if side == "right" else place.flip(0)
    mask = (place < torch.tensor(lengths, dtype=torch.long).unsqueeze(1)).long()
    ids = torch.randint(2, SIZES["vocab_size"], (len(lengths), length), generator=generator)
    return dict(input_ids=ids.where(mask.bool(), 1), attention_mask=mask)


def encoder_of(model: nn.Module) -> nn.Module:
    """The bare encoder of a tiny model."""
    return getattr(model, model.base_model_prefix, model)


def run_alone(model: nn.Module, ids: Tensor, path: Tensor, **options):
    """The oracle: one sample ``(S,)`` without padding through the layers of ``path``, by the original
    classes."""
    encoder = encoder_of(model)
    every = encoder.encoder.layer
    try:
        encoder.encoder.layer = nn.ModuleList(layer for layer, kept in zip(every, path, strict=True) if kept)
        return model(input_ids=ids.unsqueeze(0), **options)
    finally:
        encoder.encoder.layer = every
