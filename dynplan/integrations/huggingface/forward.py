"""The forward of a swapped encoder: Hugging Face's signature and outputs round the planned encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from dynplan.integrations.huggingface import traced
from dynplan.integrations.huggingface.arguments import (
    check_mask,
    check_options,
    check_positional,
    explain,
    odd_options,
    refuse_outputs,
)
from dynplan.integrations.huggingface.controller import Controller
from dynplan.integrations.huggingface.eager import run_packed, run_padded
from dynplan.integrations.huggingface.encoder_state import GRADIENTS, READS_PADDING, EncoderState
from dynplan.integrations.huggingface.families import Family
from dynplan.integrations.huggingface.fast_path import run_fast
from dynplan.integrations.huggingface.fused import run_fused
from dynplan.integrations.huggingface.original import run_original
from dynplan.integrations.huggingface.outputs import new_output
from dynplan.ops import Packed, unpack
from dynplan.ops.embed_tokens import embed_tokens
from dynplan.ops.planned_encoder import check_first, pack_padded
from dynplan.plans import Decisions, Gates
from dynplan.policies import PlanRequest
from dynplan.snapshot import mode_reason


class SwappedForward:
    """Takes the place of ``model.forward`` on one instance of a bare model.

    An object rather than a closure, so that deep copies and pickles of the model hold a forward of their own.

    Args:
        model: the bare model (``BertModel`` and its like).
        family: of it.
        controller: steers it.
        reads: what is read of the last states, as in :data:`~.families.READS`; "all": padding too.
    """

    def __init__(self, model: nn.Module, family: Family, controller: Controller, reads: str) -> None:
        self.model = model
        self.family = family
        self.controller = controller
        self.reads = reads
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.handle = traced.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies are found by a handle of their own.
        self.__dict__.update(state, handle=traced.register(self))

    @property
    def reads_first(self) -> bool:
        """Whether a pooler or the head reads the state at position 0."""
        return self.reads == "first" or self.model._modules.get("pooler") is not None

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer and others choose the columns of a data set by the forward's signature.
        signature = inspect.signature(type(self.model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        # torch.export wants to know where a forward is written.
        return SwappedForward.__call__.__code__

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See the original model's forward for arguments and outputs.

        Where the kernels or packed rows did the work, padding positions of ``last_hidden_state`` and of all
        ``hidden_states`` but the first are zero, or what norms after the layers make of zeros.

        Raises:
            NotImplementedError: an argument that this forward would have to get wrong, or a model that has
                become something that no plan can be right for.
            ValueError: arguments that do not fit each other.
            IndexError: ids outside their table (CPU).
        """
        if self.family.embedding_parts is None:
            return self._run_original(args, options)
        if (given := self.controller.given) is not None:
            return self._output(given, None, True)
        if args:
            options |= check_positional(args, self.names, options)
        take = options.pop
        input_ids, inputs_embeds = take("input_ids", None), take("inputs_embeds", None)
        attention_mask = take("attention_mask", None)
        position_ids, token_type_ids = take("position_ids", None), None
        if self.family.embedding_parts.token_type is not None:
            token_type_ids = take("token_type_ids", None)
        # Past the config's own __getattribute__, which costs more than all the rest of this.
        defaults = self.model.config.__dict__
        attentions, collect = take("output_attentions", None), take("output_hidden_states", None)
        return_dict = take("return_dict", None)
        attentions = defaults["_output_attentions"] if attentions is None else attentions
        collect = defaults["output_hidden_states"] if collect is None else collect
        return_dict = defaults["return_dict"] if return_dict is None else return_dict
        check_options(options, attentions, collect)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "dynplan: expected exactly one of input_ids and inputs_embeds, got both or neither"
            )
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if traced.is_tracing():
            last, states = traced.run(self, inputs, collect)
        else:
            last, states = self.run(inputs, collect)
        return self._output(last, states, return_dict)

    def run(
        self, inputs: tuple[Tensor | None, ...], collect: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Last hidden states ``(B, S, H)``, and all of them if asked for.

        Args:
            inputs: input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds.
            collect: whether all are asked for.
        """
        controller = self.controller
        state = controller.state()
        if state.why_refused is not None:
            raise NotImplementedError(f"dynplan: {state.why_refused}; call dynplan.unswap(model)")
        gates = controller.take_gates()
        reason = "gates are set" if gates is not None else self._why_not_fused(state, *inputs[1::3])
        if reason is None and state.embeddings is not None and not (inputs[3:] != (None, None) or collect):
            done = run_fast(state, controller, *inputs[:3], self.reads_first)
            if done is not None:
                controller.note(done[1])
                return done[0], None
        controller.tell(reason, warn=gates is None)  # those who set gates know
        if reason is not None and torch.is_grad_enabled():
            controller.refresh()
            state = controller.state()  # backward hooks are not watched
            controller.refresh()  # an optimizer step usually follows, and some keep no record
        last, states, plan, reason = self._run_op_by_op(state, inputs, collect, gates, reason)
        controller.note(plan, reason)
        if last.requires_grad:
            last.register_hook(lambda _: controller.refresh())
        return last, states

    def _why_not_fused(
        self, state: EncoderState, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> str | None:
        """Why the kernels cannot do this forward; None: they can."""
        if self._reads_padding(attention_mask):
            return READS_PADDING
        if state.why_not_fused is not None or (mode := mode_reason()) is not None:
            return state.why_not_fused or mode
        if torch.is_grad_enabled():
            given = inputs_embeds is not None and inputs_embeds.requires_grad
            if given or any(parameter.requires_grad for parameter in self.model.parameters()):
                return GRADIENTS
        return None

    def _reads_padding(self, attention_mask: Tensor | None) -> bool:
        """Whether there is padding, and the head reads it; a GPU is not asked whether there is."""
        if self.reads != "all" or attention_mask is None:
            return False
        return not attention_mask.is_cpu or not bool(attention_mask.all())

    def _run_op_by_op(
        self,
        state: EncoderState,
        inputs: tuple[Tensor | None, ...],
        collect: bool,
        gates: Gates | None,
        reason: str | None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor, str | None]:
        """As :meth:`run`, and the plan; by the kernels where there is no ``reason`` against them, which comes
        back, since embeddings may bring gradients along."""
        input_ids, attention_mask, *_ = inputs
        controller, family = self.controller, self.family
        padded = reason is not None and (
            state.why_not_packed is not None
            or mode_reason() is not None
            or self._reads_padding(attention_mask)
        )
        embedded, packed, attention_mask = self.embed(state, inputs, collect or padded, reason)
        batch_size, length = (embedded if input_ids is None else input_ids).shape[:2]
        hidden, indices, cu_seqlens = pack_padded(embedded, attention_mask) if packed is None else packed
        # A GPU's packed rows are always as many as positions; only the device knows how many are tokens.
        if hidden.is_cpu and hidden.shape[0] == batch_size * length:
            indices = None
        elif self.reads_first and attention_mask is not None and not padded:
            check_first(attention_mask)
        policy, layers = controller.policy, len(state.layers)
        request = controller.request(batch_size, layers, hidden, cu_seqlens, input_ids, attention_mask)
        if reason is None and hidden.requires_grad:
            reason = GRADIENTS
            controller.tell(reason, warn=True)
        if reason is None:
            last, plan, states = run_fused(state, request, policy, collect)
        else:
            decide = Decisions(request, policy, gates)
            if padded:
                config = self.model.config
                last, states = run_padded(state, family, config, embedded, attention_mask, decide, collect)
                packed = pack_padded(last, attention_mask).hidden if policy.reads_answers else last
                last = last if gates is not None else self._read_by_exits(request, packed, decide.plan, last)
                return last, states, decide.plan, reason
            last, states = run_packed(state, family, hidden, decide, collect)
            plan = decide.plan

        def restore(packed: Tensor) -> Tensor:
            if indices is None:
                return packed.view(batch_size, length, packed.shape[1])
            return unpack(packed, indices, batch_size, length)

        packed, last = last, restore(last)
        last = last if gates is not None else self._read_by_exits(request, packed, plan, last)
        states = None if states is None else (embedded, *map(restore, states[1:-1]), last)
        return last, states, plan, reason

    def _read_by_exits(self, request: PlanRequest, packed: Tensor, plan: Tensor, last: Tensor) -> Tensor:
        """The last states ``(B, S, H)``; in first position what the head shall read of samples that left."""
        controller = self.controller
        if request.stream is not None and not controller.policy.takes_stream:
            request.stream.record(plan, request.cu_seqlens)
        reads = controller.policy.reads(request, packed, plan)
        if reads is None:
            return last
        left, states = reads
        first = torch.where(left.unsqueeze(1), states.to(last.dtype), last[:, 0])
        return torch.cat((first.unsqueeze(1), last[:, 1:]), 1)

    def embed(
        self, state: EncoderState | None, inputs: tuple[Tensor | None, ...], whole: bool, reason: str | None
    ) -> tuple[Tensor | None, Packed | None, Tensor | None]:
        """Embeddings of every position, or packed ones of the tokens; the mask, checked."""
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = inputs
        modules = self.model._modules
        embeddings, project = modules[self.family.embeddings], modules.get(self.family.projection)
        embedded = packed = None
        try:
            batch_size, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
            if attention_mask is not None:
                attention_mask = check_mask(attention_mask, batch_size, length)
            if token_type_ids is not None and token_type_ids.shape[0] == 1 and batch_size != 1:
                token_type_ids = token_type_ids.expand(batch_size, length)
            alone = position_ids is None and inputs_embeds is None
            if reason is None and alone and state.embeddings is not None:
                mask = None if whole else attention_mask
                packed = embed_tokens(input_ids, mask, token_type_ids, *state.embeddings)
                if project is not None:
                    packed = packed._replace(hidden=project(packed.hidden))
                if whole:
                    embedded, packed = packed.hidden.view(batch_size, length, -1), None
            else:
                given = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
                if self.family.embedding_parts.token_type is not None:
                    given["token_type_ids"] = token_type_ids
                embedded = embeddings(**given)
                embedded = embedded if project is None else project(embedded)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            # Looked at only now: a check before each forward would cost two passes over the ids.
            explain(error, embeddings, self.family.embedding_parts, inputs)
            raise
        return embedded, packed, attention_mask

    @torch.compiler.disable(reason="dynplan: the forward is the model's own, with its layers planned")
    def _run_original(self, args: tuple, options: dict[str, Any]) -> Any:
        """The model's own forward, with its layers planned."""
        model, controller = self.model, self.controller
        given = options | check_positional(args, self.names, options)
        refuse_outputs(given, model.config)
        state = controller.state()
        if state.why_refused is not None:
            raise NotImplementedError(f"dynplan: {state.why_refused}; call dynplan.unswap(model)")
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise NotImplementedError(
                f"dynplan: a program cannot hold the planned layers of {type(model).__name__}; call "
                "dynplan.unswap(model) to record the original"
            )
        if controller.policy.reads_answers:
            raise NotImplementedError(
                f"dynplan: expected a policy without exits for {type(model).__name__}, got "
                f"{type(controller.policy).__name__}; its first position is no summary of a sample"
            )
        gates = controller.take_gates()
        mask, collect = given.get("attention_mask"), given.get("output_hidden_states")
        collect = getattr(model.config, "output_hidden_states", False) if collect is None else collect
        plan = reason = request = None
        odd = odd_options(given, self.names)

        def begin(hidden: Tensor) -> Callable | list[Tensor]:
            nonlocal plan, reason, mask, odd, request
            if mask is not None and mask.shape[1:] != hidden.shape[1:2]:
                mask, odd = None, "attention_mask is not one of positions (B, S)"
            if mask is not None:
                mask = check_mask(mask, *hidden.shape[:2])
            rows, indices, offsets = pack_padded(hidden, mask)
            request = controller.request(
                len(hidden), len(state.layers), rows, offsets, given.get("input_ids"), mask
            )
            odd = odd or self._why_not_packed(state, mask)
            reason = "gates are set" if gates is not None else odd or self._why_not_fused(state, mask)
            controller.tell(reason, warn=gates is None)
            if reason is not None and torch.is_grad_enabled():
                controller.refresh()  # an optimizer step usually follows, and some keep no record
            decide = None if reason is None else Decisions(request, controller.policy, gates)
            if decide is not None:
                plan = decide.plan  # filled as it goes
                if odd is not None:
                    return decide
            if decide is None:
                last, plan, states = run_fused(state, request, controller.policy, bool(collect))
            else:
                bias = self.family.parts.bias
                bias = None if bias is None else bias(state.stack, hidden)
                last, states = run_packed(state, self.family, rows, decide, bool(collect), bias)
            return [
                packed.view_as(hidden) if indices is None else unpack(packed, indices, *hidden.shape[:2])
                for packed in (states[1:] if collect else [last])
            ]

        output = run_original(model, state, (args, options), begin)
        if request.stream is not None and gates is None and not controller.policy.takes_stream:
            request.stream.record(plan, request.cu_seqlens)
        controller.note(plan, reason)
        if output[0].requires_grad:
            output[0].register_hook(lambda _: controller.refresh())
        return output

    def _why_not_packed(self, state: EncoderState, attention_mask: Tensor | None) -> str | None:
        """Why layers cannot run on packed rows; None: they can."""
        reason = state.why_not_packed or mode_reason()
        if reason is not None or attention_mask is None:
            return reason
        if self._reads_padding(attention_mask):
            return READS_PADDING
        if self.reads_first and not bool((attention_mask[:, 0] != 0).all()):
            return "padding comes first, where the head reads"
        if self.family.parts.bias is not None:
            # What is added is for positions so far apart, and packing must not bring them closer.
            ends = (attention_mask[:, 1:] != attention_mask[:, :-1]).sum(1) + (attention_mask[:, 0] != 0)
            if not bool((ends <= 2).all()):
                return "there is padding between tokens"
        return None

    def _output(self, last: Tensor, states: tuple[Tensor, ...] | None, return_dict: bool) -> Any:
        modules = self.model._modules
        if "pooler" in modules:
            pooler = modules["pooler"]
            pooled = {} if pooler is None else {"pooler_output": pooler(last)}
            kind = BaseModelOutputWithPoolingAndCrossAttentions
        else:
            pooled, kind = {}, self.family.output
        if traced.is_tracing():
            output = kind(last, hidden_states=states, **pooled)
        else:
            output = new_output(kind, last_hidden_state=last, hidden_states=states, **pooled)
        return output if return_dict else output.to_tuple()
