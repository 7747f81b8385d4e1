"""Models and tokenizers from folders; what cannot be loaded is told in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynplan.errors import InputError

_MOST = 4096  # layers or heads


def load(name: str, folder: str | Path, loader: Callable[[str | Path], Any]) -> Any:
    """Call a loader; whatever it raises becomes one line that says what was expected.

    Args:
        name: of the option that gave the folder.
        folder: its argument.
        loader: called with it.

    Returns:
        What the loader gives.

    Raises:
        InputError: the loader raised.
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


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; transformers would make up an empty one where there is none.

    Args:
        folder: of a model with its tokenizer.

    Returns:
        The tokenizer.

    Raises:
        InputError: a folder without a tokenizer, a damaged one, or one without a padding token.
    """
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


def check_config(folder: str | Path, config) -> None:
    """Refuse numbers of layers and heads that no model has, before one is built: transformers takes -1 for
    none, and would go on for as long as 10**12 layers take.
    """
    for name in ("num_hidden_layers", "num_attention_heads"):
        number = getattr(config, name, 1)
        if isinstance(number, int) and (number is True or not 1 <= number <= _MOST):
            raise InputError(
                f"model: expected {name} to be within 1..{_MOST} in the config of {folder}, "
                f"got {number!r:.100}"
            )


def missing_weights(folder: str | Path, model: nn.Module, info: dict) -> None:
    """Refuse a model whose encoder is not all in ``folder``; its head and pooler may be fresh.

    info: what ``from_pretrained(output_loading_info=True)`` gave.
    """
    prefix = model.base_model_prefix + "."
    inside = "" if model is model.base_model else prefix
    fresh = sorted(
        name
        for name in info["missing_keys"]
        if name.startswith(inside) and not name.removeprefix(prefix).startswith("pooler.")
    )
    if fresh:
        raise InputError(
            f"model: expected weights of the whole encoder in {folder}, got none for {fresh[0]}"
            + (f" and {len(fresh) - 1} more" if len(fresh) > 1 else "")
        )


def quiet() -> None:
    """No tables and bars from transformers: what matters in them is checked, and said in a line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
