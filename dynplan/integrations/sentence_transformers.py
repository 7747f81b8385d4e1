"""Models of sentence-transformers: what is swapped is the encoder inside, in place.

This module does not import sentence-transformers before it loads such a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

# Modules after the encoder that ignore what stands at padding; a pooling may read the first position.
_IGNORE_PADDING = ("Pooling", "Normalize", "Dense", "Dropout", "LayerNorm", "LogitScore")


def encoder_inside(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The Hugging Face model in a ``SentenceTransformer`` or ``CrossEncoder``, and what is read of it:
    "first" position, or "all", padding too; None: another model.
    """
    if not any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__):
        return None
    inner = getattr(model, "transformers_model", None)
    if not isinstance(inner, nn.Module):
        return None
    _, *after = model.children()
    known = all(
        type(module).__name__ in _IGNORE_PADDING
        and type(module).__module__.startswith("sentence_transformers.")
        for module in after
    )
    return inner, "first" if known else "all"


def is_folder_of(folder: str | os.PathLike) -> bool:
    """Whether a model of sentence-transformers was saved there."""
    return (Path(folder) / "modules.json").exists()


def load(folder: str | os.PathLike, **options: Any) -> nn.Module:
    """The model in a folder, of the class that was saved.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: its class is none of that package.
    """
    import json

    import sentence_transformers

    description = Path(folder) / "config_sentence_transformers.json"
    name = json.loads(description.read_text(encoding="utf-8")).get("model_type", "SentenceTransformer")
    kind = getattr(sentence_transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"from_pretrained: expected a class of sentence_transformers in {description}, got {name}"
        )
    return kind(str(folder), **options).eval()
