"""What a swapped forward is given: checked, and explained where it was wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynplan.integrations.huggingface.families import EmbeddingParts

# Arguments that change nothing in an encoder's forward: a decoder's, and those of losses and tokenizers.
_HARMLESS = frozenset(("use_cache", "num_items_in_batch", "special_tokens_mask"))
# Those of decoders.
_OTHERS = ("encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values", "is_causal")
_FORMS = frozenset(("output_attentions", "output_hidden_states", "return_dict"))


def check_positional(
    args: tuple[Any, ...], names: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Positional arguments by their names.

    Raises:
        TypeError: more of them than names, or one that is given by name too.
    """
    given = dict(zip(names, args, strict=False))
    twice = given.keys() & options.keys()
    if len(args) > len(names) or twice:
        raise TypeError(
            f"dynplan: expected each of {', '.join(names)} at most once, got {len(args)} by position"
            + "".join(f" and {name} by name" for name in sorted(twice))
        )
    return given


def check_options(options: dict[str, Any], output_attentions: Any, output_hidden_states: Any) -> None:
    """Refuse what would have to come out wrong.

    Raises:
        NotImplementedError: any argument that the forward does not know, with the reason.
    """
    for name, value in options.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise NotImplementedError(
                f"dynplan: expected no argument {name}, got one; call dynplan.unswap(model) to use it"
            )
    _refuse_attentions(output_attentions)
    if not isinstance(output_hidden_states, bool):
        raise NotImplementedError(
            f"dynplan: expected output_hidden_states to be a bool, got {output_hidden_states!r}"
        )


def refuse_outputs(options: dict[str, Any], config: object) -> None:
    """Refuse what a model's own forward could not give with its layers planned.

    Raises:
        NotImplementedError: attention weights, or another model's states to attend to.
    """
    given = options.get("output_attentions")
    _refuse_attentions(getattr(config, "output_attentions", False) if given is None else given)
    for name in _OTHERS:
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(
                f"dynplan: expected no argument {name}, got one; call dynplan.unswap(model) to use it"
            )


def odd_options(options: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """What is given beyond a forward's own arguments, which may be for its layers; None: nothing."""
    odd = [
        name
        for name, value in options.items()
        if name not in names and name not in _HARMLESS and name not in _FORMS and value is not None
    ]
    return f"{', '.join(odd)} may be for the layers" if odd else None


def _refuse_attentions(wanted: Any) -> None:
    if wanted:
        raise NotImplementedError(
            "dynplan: expected output_attentions=False, got True; attention is computed in tiles "
            "that are never written down, and a bypassed sample has none"
        )


def check_mask(mask: Tensor, batch_size: int, length: int) -> Tensor:
    """The mask as integers or bools ``(B, S)``; one row for all samples is repeated."""
    # Neither formatted nor compared as a whole unless wrong: Dynamo would take sizes for constants.
    if mask.dim() != 2:
        raise NotImplementedError(
            f"dynplan: expected attention_mask of shape (B, S) = ({batch_size}, {length}), got "
            f"{tuple(mask.shape)}; a mask per query or head cannot be packed"
        )
    if mask.shape[0] == 1 and batch_size != 1 and mask.shape[1] == length:
        mask = mask.expand(batch_size, length)
    if mask.shape[0] != batch_size or mask.shape[1] != length:
        raise ValueError(
            f"dynplan: expected attention_mask of shape (B, S) = ({batch_size}, {length}), got "
            f"{tuple(mask.shape)}"
        )
    if mask.is_floating_point():
        whole = mask.to(torch.int32)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return whole.masked_fill(whole.to(mask.dtype) != mask, 2)  # which pack refuses when it runs
        if mask.device.type == "cpu" and not torch.equal(whole.to(mask.dtype), mask):
            raise ValueError("dynplan: expected attention_mask of 0 and 1, got other values")
        mask = whole
    return mask


def explain(
    cause: Exception, embeddings: nn.Module, parts: EmbeddingParts, inputs: tuple[Tensor | None, ...]
) -> None:
    """Raise an error that names the argument the embeddings choked on, if it is one of the usual ones."""
    input_ids, _, token_type_ids, position_ids, inputs_embeds = inputs
    given = input_ids if input_ids is not None else inputs_embeds
    names = (parts.word, parts.token_type, parts.position)
    tables = [getattr(embeddings, name, None) for name in names if name is not None]
    if not all(isinstance(table, nn.Embedding) for table in tables):
        return  # somebody else's, with errors of its own
    arguments = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
    known = [argument for argument, name in zip(arguments, names, strict=True) if name is not None]
    for name, table in zip(known, tables, strict=True):
        ids = arguments[name]
        if ids is None:
            continue
        if ids.device != table.weight.device:
            raise ValueError(
                f"dynplan: expected {name} on {table.weight.device}, got {ids.device}"
            ) from cause
        if not ids.numel() or ids.device.type != "cpu":
            continue
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"dynplan: expected {name} to be integer, got {ids.dtype}") from cause
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= table.num_embeddings:
            found = low if low < 0 else high
            raise IndexError(
                f"dynplan: expected {name} within 0..{table.num_embeddings - 1}, got {found}"
            ) from cause
        if ids.dim() != 2 or (name == "token_type_ids" and ids.shape != given.shape[:2]):
            raise ValueError(
                f"dynplan: expected {name} of shape (B, S) as the other inputs, got {tuple(ids.shape)}"
            ) from cause
    usable = longest(embeddings, parts)
    if position_ids is None and given.dim() >= 2 and given.shape[1] > usable:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise ValueError(
            f"dynplan: expected {name} of at most {usable} tokens per sample, got {given.shape[1]}"
        ) from cause


def longest(embeddings: nn.Module, parts: EmbeddingParts) -> int:
    """Tokens of a sample that the position embeddings have room for."""
    table = getattr(embeddings, parts.position)
    offset = table.padding_idx
    return table.num_embeddings - (0 if offset is None else offset + 1)
