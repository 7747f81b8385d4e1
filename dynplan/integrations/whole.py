"""A swapped encoder's forward in one op, for as long as nothing stands in its way.

One short text leaves no more than its weights in the caches, and whatever is looked at between two forwards
is waited for. So what may not have changed is gathered once and checked as a whole, and what remains of the
forward is one call. Everything else takes the long way (:mod:`dynplan.integrations.forward`), with the same
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dynplan.integrations.controller import Controller
from dynplan.integrations.embeddings import PlainEmbeddings
from dynplan.integrations.encoder import PlannedEncoder, plan_upfront
from dynplan.integrations.places import Places
from dynplan.ops.encode_tokens import encode_tokens
from dynplan.policies import KeepAll, PlanRequest

# Settings of the configuration that a forward falls back on, and what they have to be.
_SETTINGS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


class WholeForward:
    """Runs forwards that ask for nothing but the last hidden states, where everything is plain.

    That is: inference on a CPU in float32, embeddings and layers as Hugging Face has them, without hooks or
    adapters, and a policy that decides without hidden states.

    Args:
        encoder: the bare model.
        controller: steers it.
        reads_first: whether the state at position 0 is read.
    """

    def __init__(self, encoder: nn.Module, controller: Controller, reads_first: bool) -> None:
        self.encoder = encoder
        self.controller = controller
        self.reads_first = reads_first
        self._facts: _Facts | None = None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        plain: PlainEmbeddings,
    ) -> Tensor | None:
        """Last hidden states ``(B, S, H)``; None where the long way has to be taken, or to explain an error.

        Args:
            input_ids, attention_mask, token_type_ids: see the original model's forward.
            plain: the embeddings.
        """
        controller = self.controller
        policy = controller.policy
        if (
            torch.is_grad_enabled()
            or type(input_ids) is not Tensor
            or not input_ids.is_cpu
            or input_ids.dim() != 2
            or (attention_mask is not None and not _is_mask(attention_mask, input_ids))
            or policy.reads_hidden
            or policy.stepwise
            or controller.gates is not None
        ):
            return None
        facts = self._facts
        if facts is None or not facts.hold():
            # Read once and written once, whole: another thread may come to the same conclusion meanwhile.
            facts = self._facts = self._look(plain)
            if facts is None:
                return None
        if type(policy) is KeepAll and controller.budget is None:
            keep = None
        else:
            keep = plan_upfront(policy, _RequestAhead(controller, input_ids, attention_mask))
        try:
            hidden = encode_tokens(
                input_ids,
                attention_mask,
                token_type_ids,
                *facts.embeddings,
                keep,
                facts.packed,
                *facts.shape,
                self.reads_first,
                None if torch.jit.is_tracing() else facts.watch,  # a trace outlives the watch
            )
        except (IndexError, RuntimeError, TypeError, ValueError):
            self._facts = None  # perhaps weights have changed
            return None
        controller.note_plan((input_ids.shape[0], len(facts.packed)) if keep is None else keep)
        return hidden

    def _look(self, plain: PlainEmbeddings) -> _Facts | None:
        encoder = self.controller.encoder
        stack, places = encoder.stack, plain.places()
        if stack is None or places is None:
            return None
        facts = _Facts(self.encoder, encoder, plain)
        # In this order: what another thread writes meanwhile is seen now, or later by the watch.
        return facts if facts.hold() and stack.holds() else None

    def __getstate__(self) -> dict:
        # Copies and pickles look at their own modules.
        return {**vars(self), "_facts": None}


class _RequestAhead(PlanRequest):
    """A request before anything is embedded: without hidden states, and with offsets for those who ask."""

    __slots__ = ()

    def __init__(self, controller: Controller, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.batch_size = input_ids.shape[0]
        self.num_layers = controller.num_layers
        self.hidden = _NOTHING
        self.budget = controller.budget
        self.input_ids = input_ids
        self.attention_mask = attention_mask

    @property
    def cu_seqlens(self) -> Tensor:
        if self.attention_mask is None:
            return torch.arange(self.batch_size + 1, dtype=torch.int32) * self.input_ids.shape[1]
        offsets = torch.zeros(self.batch_size + 1, dtype=torch.int32)
        offsets[1:] = (self.attention_mask != 0).sum(1).cumsum(0)
        return offsets


_NOTHING = torch.empty(0, 0)


def _is_mask(mask: Tensor, input_ids: Tensor) -> bool:
    return not mask.is_floating_point() and mask.is_cpu and mask.shape == input_ids.shape


def _is_setting(places: Places, config: PretrainedConfig, name: str, wanted: bool) -> bool:
    own = object.__getattribute__(config, "__dict__")
    return places.stay(own, name if name in own else f"_{name}") is wanted


class _Facts:
    """What the forwards of a plain encoder have in common, and how to tell that it is still so."""

    def __init__(self, model: nn.Module, encoder: PlannedEncoder, plain: PlainEmbeddings) -> None:
        stack = encoder.stack
        self.embeddings = plain.arguments()
        self.packed = stack.packed
        self.shape = encoder.shape
        tables = self.embeddings[:5]
        places = Places()
        places.include(plain.places())
        places.include(stack.places)
        for table, name in plain.parameters:
            places.stay(table, name)
        self._layers = encoder.layers._modules
        self._settled = (
            list(self._layers.values()) == stack.layers
            and plain.module is places.stay(model._modules, "embeddings")
            and "embeddings_project" not in model._modules
            and all(table.dtype == torch.float32 for table in tables)
            and all(_is_setting(places, model.config, name, wanted) for name, wanted in _SETTINGS.items())
        )
        for name in self._layers:
            places.stay(self._layers, name)
        for module in (plain.module, *stack.layers):
            self._settled &= places.stay(vars(module), "training") is False
        places.stay(vars(model), "config")
        self._count = len(self._layers)
        self._entries = places.watch()
        self._watch = torch.classes.dynplan.WeightWatch([*tables, *stack.tensors])
        self.watch = self._watch.number()

    def hold(self) -> bool:
        """Whether all is as it was but for the contents of tensors: for those the op asks ``watch``."""
        return self._settled and len(self._layers) == self._count and self._entries.same()
