"""The encoder by its own modules: exact whatever hangs on them, differentiable, slower than the kernels.

Packed where only linear modules differ from the original's (adapters), or where gradients or dropout are
wanted: each layer runs on the rows of those who take it. Padded where anything else does: each layer is
called as the original calls it, on the samples that take it, or on all where something on it might mind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.integrations.huggingface.families import PER_SAMPLE, Family
from dynplan.ops.build_dispatch import Dispatch, build_dispatch
from dynplan.ops.conditional_encoder_layer import ActiveSizes, active_sizes, attend_packed
from dynplan.ops.planned_encoder import pack_padded
from dynplan.plans import Decisions, taken
from dynplan.snapshot import own_forward


def run_packed(
    state: EncoderState,
    family: Family,
    hidden: Tensor,
    decide: Decisions,
    collect: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """Run all layers on packed rows ``(T, H)``; their states, and those between layers if asked for.

    ``bias`` ``(1, heads, S, S)`` is added to the scores of attention.
    """
    offsets, capacity = decide.request.cu_seqlens, hidden.shape[0]
    ahead = decide.taken()
    # Shapes depend on the sizes, which the host reads back: once where it can, else once a layer.
    steps = None if ahead is None else _Step.of_all(build_dispatch(ahead, offsets, capacity))
    states = [hidden] if collect else None
    for index, layer in enumerate(state.layers):
        keep, gate = decide(index, lambda: hidden)  # noqa: B023  called at once
        step = steps[index] if steps else _Step.of(build_dispatch(taken(keep, gate), offsets, capacity))
        share = None if gate is None else gate.index_select(0, _samples_of(step.rows, offsets))
        hidden = _bypass(layer, family, hidden, step, share, bias)
        if collect:
            states.append(hidden)
    return hidden, states


class _Step(NamedTuple):
    """One layer's dispatch, with the sizes that the host needs.

    Attributes:
        rows: ``(N,)``, the active rows.
        cu_seqlens: of the active samples.
        sizes: of both.
    """

    rows: Tensor
    cu_seqlens: Tensor
    sizes: ActiveSizes

    @classmethod
    def of(cls, dispatch: Dispatch) -> _Step:
        sizes = active_sizes(dispatch.cu_seqlens.tolist())
        return cls(dispatch.rows[: sizes.rows], dispatch.cu_seqlens, sizes)

    @classmethod
    def of_all(cls, dispatch: Dispatch) -> list[_Step]:
        sizes = [active_sizes(offsets) for offsets in dispatch.cu_seqlens.tolist()]
        return [
            cls(dispatch.rows[layer, : of_layer.rows], dispatch.cu_seqlens[layer], of_layer)
            for layer, of_layer in enumerate(sizes)
        ]


def _samples_of(rows: Tensor, offsets: Tensor) -> Tensor:
    """The sample of each packed row."""
    return torch.searchsorted(offsets[1:], rows, right=True)


def _bypass(
    layer: nn.Module,
    family: Family,
    hidden: Tensor,
    step: _Step,
    share: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``layer`` on the active rows, mixed by ``share`` ``(N,)``; all other rows as they came."""
    if not step.sizes.rows:
        return hidden
    inside = hidden.index_select(0, step.rows)
    attention = layer.get_submodule(family.parts.attention)
    dropout = attention.dropout.p if attention.training else 0.0

    def attend(*parts: Tensor) -> Tensor:
        heads = parts[0].shape[1] // attention.attention_head_size
        return attend_packed(torch.cat(parts, 1), step.cu_seqlens, step.sizes, heads, dropout, bias)

    run = partial(family.parts.forward, layer, attend=attend)
    if layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False):
        outside = layer._gradient_checkpointing_func(run, inside)
    else:
        outside = run(inside)
    outside = outside.to(hidden.dtype)
    if share is not None:
        share = share.unsqueeze(1).to(hidden.dtype)
        outside = share * outside + (1 - share) * inside
    return hidden.index_copy(0, step.rows.long(), outside)


def run_layer(
    state: EncoderState,
    layer: nn.Module,
    before: Tensor,
    args: tuple,
    options: dict[str, Any],
    keep: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """One layer on padded states ``(B, S, H)`` for those who take it; all others keep theirs.

    Args:
        state: of the encoder.
        args, options: what the layer is called with after the states, for the whole batch.
        keep: bool ``(B,)``.
        gate: ``(B,)``, or None.
    """
    computed = taken(keep, gate)
    rows = None
    if not torch.compiler.is_compiling() and not (everyone := bool(computed.all())):
        if not computed.any():
            return before
        rows = None if everyone or state.why_not_by_sample() else computed.nonzero().flatten()
    inside = before
    if rows is not None:
        inside = before.index_select(0, rows)
        args, options = _of_samples(layer, args, options, rows, len(before))
        gate = None if gate is None else gate.index_select(0, rows)
    after = layer(inside, *args, **options)
    after = after[0] if isinstance(after, tuple) else after
    if gate is not None:
        gate = gate.view(-1, 1, 1).to(before.dtype)
        after = gate * after + (1 - gate) * inside
    elif rows is None:
        after = torch.where(keep.view(-1, 1, 1), after, before)
    if rows is None:
        return after
    kind = torch.promote_types(before.dtype, after.dtype)
    return before.to(kind).index_copy(0, rows, after.to(kind))


def _of_samples(
    layer: nn.Module, args: tuple, options: dict[str, Any], rows: Tensor, batch_size: int
) -> tuple[list, dict[str, Any]]:
    """Arguments of a layer for some samples of a batch."""

    def chosen(name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(chosen(name, part) for part in value)
        if name in PER_SAMPLE and isinstance(value, Tensor) and value.dim() and len(value) == batch_size:
            return value.index_select(0, rows)
        return value

    named = zip(names_of(type(layer))[1:], args, strict=False)
    return [chosen(*pair) for pair in named], {name: chosen(name, value) for name, value in options.items()}


@cache
def names_of(kind: type) -> tuple[str, ...]:
    """Names of the arguments of a layer's class, the states first."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def run_padded(
    state: EncoderState,
    family: Family,
    config: object,
    hidden: Tensor,
    attention_mask: Tensor | None,
    decide: Decisions,
    collect: bool,
) -> tuple[Tensor, list[Tensor] | None]:
    """Run all layers on padded states ``(B, S, H)``, as the original's own loop would call them.

    Returns:
        States after the last layer and, if asked for, before each and after the last; at padding what the
        original computes there.

    Raises:
        NotImplementedError: the loop itself is not the original's, and the plan bypasses a layer.
    """
    states = [] if collect else None

    def loop(hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object) -> BaseModelOutput:
        if collect:
            states.append(hidden_states)
        for index, layer in enumerate(state.layers):
            hidden_states = _keep(layer, index, hidden_states, attention_mask)
            if collect:
                states.append(hidden_states)
        return BaseModelOutput(last_hidden_state=hidden_states)

    def _keep(layer: nn.Module, index: int, before: Tensor, mask: Tensor | None) -> Tensor:
        keep, gate = decide(index, lambda: pack_padded(before, attention_mask).hidden)
        return run_layer(state, layer, before, (mask,), {}, keep, gate)

    run: Callable = loop
    kind = family.named(family.stack[1])
    if not own_forward(state.stack, kind):
        if own_forward(state.stack, kind, hooked=True):
            # Its hooks are called round our loop, on a stand-in that shares them.
            run = copy.copy(state.stack)
            run.forward = loop
        elif collect or decide.taken() is None or not decide.plan.all():
            raise NotImplementedError(
                f"dynplan: expected {family.prefix}{family.stack[1]}'s own forward under a plan that "
                f"bypasses layers, got another of {type(state.stack).__name__}, whose loop cannot be planned"
            )
        else:
            run = state.stack
    mask = create_bidirectional_mask(config, hidden, attention_mask)
    last = run(hidden, attention_mask=mask).last_hidden_state
    if collect:
        states[-1] = last  # a hook may have altered it
    return last, states
