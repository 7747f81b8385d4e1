"""The forward of a swapped encoder: Hugging Face's signature and outputs round the planned encoder."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    ModelOutput,
)

from dynplan.integrations.controller import Controller
from dynplan.integrations.embeddings import PlainEmbeddings
from dynplan.integrations.whole import WholeForward
from dynplan.ops import Packed, pack, unpack
from dynplan.policies import PlanRequest

# Arguments that change nothing in an encoder's forward: the first is a decoder's, the second belongs to
# losses.
_HARMLESS = frozenset(("use_cache", "num_items_in_batch"))
_POSITIONAL = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class SwappedForward:
    """Takes the place of ``encoder.forward`` on one instance.

    An object rather than a closure, so that deep copies and pickles of the model hold a forward of their own.

    Args:
        encoder: the bare model (``BertModel`` and its like).
        controller: steers it.
        reads_first: whether a pooler or the head round it reads the state at position 0.
    """

    def __init__(self, encoder: nn.Module, controller: Controller, reads_first: bool) -> None:
        self.encoder = encoder
        self.controller = controller
        self.reads_first = reads_first
        self._plain = PlainEmbeddings(encoder.embeddings)
        self._whole = WholeForward(encoder, controller, reads_first)

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer and others choose the columns of a data set by the forward's signature.
        signature = inspect.signature(type(self.encoder).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *rest: Any,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> Any:
        """See the original model's forward for arguments and outputs.

        Padding positions of ``last_hidden_state`` and of all ``hidden_states`` but the first are zero.

        Raises:
            NotImplementedError: an argument that this forward would have to get wrong.
            ValueError: arguments that do not fit each other.
            IndexError: ids outside their table (CPU).
        """
        if (
            input_ids is not None
            and position_ids is None
            and inputs_embeds is None
            and not (rest or options or output_attentions or output_hidden_states)
            and return_dict in (None, True)
        ):
            last = self._whole(input_ids, attention_mask, token_type_ids, self._plain)
            if last is not None:
                return self._output(last, None, True)
        if rest:
            raise TypeError(
                f"dynplan: expected arguments after {_POSITIONAL} by keyword, got {len(rest)} by position"
            )
        for name, value in options.items():
            if name not in _HARMLESS and value is not None and value is not False:
                raise NotImplementedError(
                    f"dynplan: expected no argument {name}, got one; call dynplan.unswap(model) to use it"
                )
        config = self.encoder.config
        if _setting(config, "output_attentions") if output_attentions is None else output_attentions:
            raise NotImplementedError(
                "dynplan: expected output_attentions=False, got True; attention is computed in tiles "
                "that are never written down, and a bypassed sample has none"
            )
        collect = (
            _setting(config, "output_hidden_states") if output_hidden_states is None else output_hidden_states
        )
        if not isinstance(collect, bool):
            raise NotImplementedError(f"dynplan: expected output_hidden_states to be a bool, got {collect!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "dynplan: expected exactly one of input_ids and inputs_embeds, got both or neither"
            )

        embedded, packed, attention_mask = self._embed(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, collect
        )
        batch_size, length = (embedded if input_ids is None else input_ids).shape[:2]
        if packed is not None:
            hidden, indices, cu_seqlens = packed
        elif attention_mask is None:
            indices = None
            hidden = embedded.flatten(0, 1)
            steps = torch.arange(batch_size + 1, dtype=torch.int32, device=embedded.device)
            cu_seqlens = steps * length
        else:
            hidden, indices, cu_seqlens = pack(embedded, attention_mask)
        # A GPU's packed rows are always as many as positions; only the device knows how many are tokens.
        if hidden.is_cpu and hidden.shape[0] == batch_size * length:
            indices = None
        elif self.reads_first and attention_mask is not None:
            self._check_first(attention_mask)

        request = PlanRequest(
            batch_size,
            self.controller.num_layers,
            hidden,
            cu_seqlens,
            input_ids=input_ids,
            attention_mask=attention_mask,
        )
        result = self.controller.run(request, collect)

        def restore(packed: Tensor) -> Tensor:
            if indices is None:
                return packed.view(batch_size, length, packed.shape[1])
            return unpack(packed, indices, batch_size, length)

        last = restore(result.hidden)
        states = (embedded, *map(restore, result.states[1:-1]), last) if collect else None
        return self._output(
            last, states, _setting(config, "return_dict") if return_dict is None else return_dict
        )

    def _embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        whole: bool,
    ) -> tuple[Tensor | None, Packed | None, Tensor | None]:
        """Embeddings, of every position if ``whole`` or if they come so; those of tokens if they come packed;
        the mask, checked."""
        modules = self.encoder._modules  # attribute look-up through nn.Module takes microseconds
        embeddings, project = modules["embeddings"], modules.get("embeddings_project")
        if self._plain.module is not embeddings:
            self._plain = PlainEmbeddings(embeddings)
        plain = self._plain.serves(position_ids, inputs_embeds)
        embedded = packed = None
        try:
            batch_size, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
            if attention_mask is not None:
                attention_mask = self._check_mask(attention_mask, batch_size, length)
            if plain:
                packed = self._plain(input_ids, None if whole else attention_mask, token_type_ids)
                if project is not None:
                    packed = packed._replace(hidden=project(packed.hidden))
                if whole:
                    embedded, packed = packed.hidden.view(batch_size, length, packed.hidden.shape[1]), None
            else:
                embedded = embeddings(
                    input_ids=input_ids,
                    token_type_ids=token_type_ids,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                )
                if project is not None:
                    embedded = project(embedded)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            # Looked at only now: a check before each forward would cost two passes over the ids.
            self._explain(error, input_ids, token_type_ids, position_ids, inputs_embeds)
            raise
        return embedded, packed, attention_mask

    def _explain(self, cause: Exception, *inputs: Tensor | None) -> None:
        """Raise an error that names the argument the embeddings choked on, if it is one of the usual ones."""
        embeddings = self.encoder.embeddings
        input_ids, token_type_ids, position_ids, inputs_embeds = inputs
        given = input_ids if input_ids is not None else inputs_embeds
        tables = (
            ("input_ids", input_ids, embeddings.word_embeddings),
            ("token_type_ids", token_type_ids, embeddings.token_type_embeddings),
            ("position_ids", position_ids, embeddings.position_embeddings),
        )
        for name, ids, table in tables:
            if ids is not None and ids.device != table.weight.device:
                raise ValueError(
                    f"dynplan: expected {name} on {table.weight.device}, got {ids.device}"
                ) from cause
            if ids is None or not ids.numel() or ids.device.type != "cpu":
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
        offset = embeddings.position_embeddings.padding_idx
        usable = embeddings.position_embeddings.num_embeddings - (0 if offset is None else offset + 1)
        if position_ids is None and given.dim() >= 2 and given.shape[1] > usable:
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            raise ValueError(
                f"dynplan: expected {name} of at most {usable} tokens per sample, got {given.shape[1]}"
            ) from cause

    def _check_mask(self, mask: Tensor, batch_size: int, length: int) -> Tensor:
        expected = f"expected attention_mask of shape (B, S) = ({batch_size}, {length})"
        if mask.dim() != 2:
            raise NotImplementedError(
                f"dynplan: {expected}, got {tuple(mask.shape)}; a mask per query or head cannot be packed"
            )
        if mask.shape != (batch_size, length):
            raise ValueError(f"dynplan: {expected}, got {tuple(mask.shape)}")
        if mask.is_floating_point():
            whole = mask.to(torch.int32)
            if mask.device.type == "cpu" and not torch.equal(whole.to(mask.dtype), mask):
                raise ValueError("dynplan: expected attention_mask of 0 and 1, got other values")
            mask = whole
        return mask

    def _check_first(self, mask: Tensor) -> None:
        """The first position is read as a sample's summary; packed, there is nothing there but tokens."""
        first = mask.select(1, 0) if mask.shape[1] else mask.any(1)
        if mask.device.type != "cpu":
            torch._assert_async((first.bool() | ~mask.any(1)).all())
        elif not first.all():
            wrong = (~first.bool() & mask.any(1)).nonzero().flatten()
            if wrong.numel():
                raise NotImplementedError(
                    "dynplan: expected attention_mask to keep the first token of every sample, since this "
                    f"model reads its summary there, got padding in sample {int(wrong[0])}; pad on the right"
                )

    def _output(self, last: Tensor, states: tuple[Tensor, ...] | None, return_dict: bool) -> Any:
        modules = self.encoder._modules
        if "pooler" in modules:
            pooler = modules["pooler"]
            pooled = None if pooler is None else pooler(last)
            output = _fill(BaseModelOutputWithPoolingAndCrossAttentions, last, pooled, states)
        else:
            output = _fill(BaseModelOutputWithPastAndCrossAttentions, last, None, states)
        return output if return_dict else output.to_tuple()


def _fill(
    kind: type[ModelOutput], last: Tensor, pooled: Tensor | None, states: tuple[Tensor, ...] | None
) -> ModelOutput:
    """A ``kind`` as its constructor would make it, without the constructor's look at every field: 24 us, and
    twice that where nothing of it is left in cache."""
    output = kind.__new__(kind)
    attributes = vars(output)
    attributes.update(_FIELDS[kind])
    for name, value in (("last_hidden_state", last), ("pooler_output", pooled), ("hidden_states", states)):
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
            attributes[name] = value
    return output


_FIELDS = {
    kind: dict.fromkeys(field.name for field in fields(kind))
    for kind in (BaseModelOutputWithPastAndCrossAttentions, BaseModelOutputWithPoolingAndCrossAttentions)
}


def _setting(config: PretrainedConfig, name: str) -> Any:
    """``getattr(config, name)``, past the configuration's own attribute look-up where that is possible."""
    own = object.__getattribute__(config, "__dict__")
    for key in (name, f"_{name}"):
        if key in own:
            return own[key]
    return getattr(config, name)
