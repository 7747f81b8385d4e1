"""Models and tokenizers from folders: what cannot be used is refused before any time is spent."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dynplan
from dynplan.errors import InputError
from dynplan.training.data import EncodedDataset, Task


def load(name: str, folder: str | Path, loader: Callable):
    """``loader(folder)``; whatever it raises becomes an InputError in one line.

    name: of the option that gave the folder.
    """
    try:
        return loader(folder)
    except InputError:
        raise
    except Exception as error:  # these loaders raise nearly anything for a damaged folder
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:300] + "..."
        raise InputError(
            f"{name}: expected a folder that can be loaded, got {folder} ({type(error).__name__}: {reason})"
        ) from error


def load_tokenizer(folder: str | Path):
    """The tokenizer in ``folder``; transformers would make up an empty one where there is none."""
    folder = Path(folder)
    tokenizer = load("tokenizer", folder, AutoTokenizer.from_pretrained)
    names = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if not any((folder / name).is_file() for name in names):
        raise InputError(
            f"tokenizer: expected one of {', '.join(names)} in {folder}, got none; "
            "save the model's tokenizer there (tokenizer.save_pretrained)"
        )
    if tokenizer.pad_token is None:
        raise InputError(f"tokenizer: expected a padding token, got a tokenizer in {folder} without")
    return tokenizer


def load_classifier(folder: str | Path, task: Task) -> nn.Module:
    """The encoder in ``folder`` in float32, with its head for ``task`` or a fresh one."""
    labels = {i: str(label) for i, label in enumerate(task.labels)} or {0: "score"}

    def from_folder(folder):
        return AutoModelForSequenceClassification.from_pretrained(
            folder,
            id2label=labels,
            label2id={label: i for i, label in labels.items()},
            # The first forward with labels would set it, and a resumed run may have none.
            problem_type="regression" if task.kind == "regression" else "single_label_classification",
            dtype=torch.float32,
            output_loading_info=True,
        )

    model, info = load("model", folder, from_folder)
    # First whether it is supported at all: another architecture lacks most weights.
    load("model", folder, lambda _: dynplan.unswap(dynplan.swap(model)))
    inside = model.base_model_prefix + "."
    fresh = sorted(
        name for name in info["missing_keys"] if name.startswith(inside) and ".pooler." not in name
    )
    if fresh:
        raise InputError(
            f"model: expected weights of the whole encoder in {folder}, got none for {fresh[0]}"
            + (f" and {len(fresh) - 1} more" if len(fresh) > 1 else "")
        )
    return model


def check_tokens(dataset: EncodedDataset, tokenizer, config) -> None:
    """See that the model knows what the tokenizer made of the rows.

    Raises InputError for rows without a known word, tokens beyond the vocabulary and rows beyond the
    positions.
    """
    tokens = {token for item in dataset.items for token in item["input_ids"]}
    if not tokens - set(tokenizer.all_special_ids):
        found = tokenizer.unk_token if tokenizer.unk_token_id in tokens else "special tokens"
        raise InputError(f"tokenizer: expected words that it knows in the rows, got only {found}")
    if max(tokens, default=0) >= config.vocab_size:
        raise InputError(
            f"tokenizer: expected tokens below the model's {config.vocab_size}, got {max(tokens)}"
        )
    # RoBERTa and its kin number the positions from behind their padding token.
    first = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    positions, longest = config.max_position_embeddings - first, max(dataset.lengths)
    if longest > positions:
        raise InputError(
            f"--max-length: expected at most the model's {positions} positions, got a row of {longest} tokens"
        )
