"""Encoders to be trained: what cannot be used is refused before any time is spent."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import dynplan
from dynplan.errors import InputError
from dynplan.loading import load, missing_weights
from dynplan.training.data import EncodedDataset, Task


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
    missing_weights(folder, model, info)
    return model


def check_tokens(dataset: EncodedDataset, tokenizer, config) -> None:
    """See that the model knows what the tokenizer made of the rows.

    Args:
        dataset: of :func:`encode_rows`.
        tokenizer (transformers.PreTrainedTokenizerBase): of the model.
        config (transformers.PretrainedConfig): of the model.

    Raises:
        InputError: rows without a known word, tokens beyond the vocabulary, rows beyond the positions.
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
