"""What a swapped model does beside its answer: hooks that look, dropout at inference, gradients, heads that
read padding, tracing and compilation."""

import copy
import logging
import os
import re

import pytest
import torch
from integrations.change import CHANGES, LENGTHS, encoder_of, layers, small
from integrations.changed_classes import at, task_of
from integrations.changed_hooks import NEVER_CALLED, ON_PADDED, PATHS
from integrations.models import batch
from integrations.test_changed_models import Refused, Stepwise, answer, refusals, worst
from torch import nn

import dynplan
from dynplan.policies import KeepAll

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = batch(LENGTHS)
MASK = INPUTS["attention_mask"].bool()


def records_of(model, path):
    """What a hook on a submodule sees in one forward, at tokens where that can be told."""
    seen = []

    def look(module, args, output):
        first = (
            output
            if isinstance(output, torch.Tensor)
            else next(iter(output.values()))
            if hasattr(output, "values")
            else output[0]
        )
        seen.append(first.detach())

    handle = at(model, path).register_forward_hook(look)
    try:
        answer(model)
    finally:
        handle.remove()
    return seen


def at_tokens(value):
    if value.shape[:2] == MASK.shape:
        return value[MASK]
    return value if value.shape[0] in (int(MASK.sum()), len(MASK)) else None


@pytest.mark.parametrize("path", [path for path in PATHS if path not in NEVER_CALLED])
def test_hooks_that_look_see_what_the_original_shows(path):
    model = small(task=task_of(path))
    theirs = records_of(copy.deepcopy(model), path)
    dynplan.swap(model)
    for _ in range(2):
        answer(model)
    try:
        ours = refusals(records_of, model, path)
    except Refused:
        assert path in ON_PADDED
        return
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        one, two = at_tokens(one), at_tokens(two)
        if one is not None and two is not None and one.shape == two.shape:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [KeepAll, Stepwise])
def test_monte_carlo_dropout(policy):
    """Only the dropouts in training mode: the answers spread as the original's do."""
    model = small()
    for layer in layers(model):
        layer.output.dropout.p = layer.attention.output.dropout.p = 0.3
    inputs = {"input_ids": INPUTS["input_ids"][:1].repeat(400, 1)}

    def draws(model, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return torch.cat([model(**inputs).logits.flatten(1) for _ in range(3)])

    twin = copy.deepcopy(model)
    dynplan.swap(model, policy())
    answer(model)
    answer(model)
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    ours, theirs = draws(model, 0), draws(twin, 1)
    assert torch.equal(ours, draws(model, 0)) and not torch.equal(ours, draws(model, 2))
    assert ours.std(0).min() > 0
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * error).all()
    share = ours.std(0) / theirs.std(0)
    assert share.min() > 0.8 and share.max() < 1.25


# One of each kind, for what takes longer.
SOME = (
    "data-mul",
    "adamw-fused",
    "load-state-dict",
    "lora-active",
    "activation-tanh-in-one-layer",
    "eps-of-output.LayerNorm",
    "hook-on-encoder.layer.1.output.dense",
    "encoder-cut-to-one-layer",
    "token-type-ids-replaced",
    "double",
)


@pytest.mark.parametrize("name", SOME)
def test_gradients_after_a_change(name):
    change = CHANGES[name]

    def gradients(model, forwards):
        for _ in range(forwards):
            answer(model)
        with change.made(model) as called:
            logits = (model if called is None else called)(**INPUTS).logits
            (logits[MASK].square().mean()).backward()
            return {key: p.grad for key, p in called.named_parameters() if p.grad is not None}

    theirs = gradients(change.original(), 0)
    ours = gradients(dynplan.swap(change.original()), 2)
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for key in theirs.keys() | ours.keys():
        one, two = ours.get(key), theirs.get(key)
        one, two = (
            torch.zeros_like(two) if one is None else one,
            torch.zeros_like(one) if two is None else two,
        )
        assert (one - two).abs().max() <= 1e-4 * largest, key


COMPILED = SOME[:3] + SOME[4:5] + SOME[6:8]


@pytest.fixture
def quiet():
    """PyTorch tells of each step of a trace; pytest keeps it, which takes longer than the trace."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, quiet):
    """Compiled, asked twice, changed, asked again: right, and it goes on being right."""
    change = CHANGES[name]
    with change.made(change.original()) as twin:
        theirs = answer(twin)
    torch._dynamo.reset()
    model = dynplan.swap(change.original())
    compiled = torch.compile(model, backend="eager")
    try:
        answer(compiled)
        answer(compiled)
        with change.made(model):
            for _ in range(2):
                assert worst(answer(compiled), theirs) < 1e-4
    finally:
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_after_two_forwards():
    # A trace of a function takes weights for constants, which must not require gradients.
    model = small().requires_grad_(False)
    theirs = answer(model)
    dynplan.swap(model)
    answer(model)
    answer(model)

    def trace():
        with torch.no_grad():
            traced = torch.jit.trace(
                lambda ids, mask: model(ids, attention_mask=mask)[0],
                (INPUTS["input_ids"], INPUTS["attention_mask"]),
                check_trace=False,
            )
            ours = traced(INPUTS["input_ids"], INPUTS["attention_mask"])
        assert worst([ours[MASK]], theirs) < 1e-4

    child = os.fork()  # a crash is one failed test, not the end of all
    if not child:
        status = 1
        try:
            trace()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_question_answering_is_exact_or_refused():
    """Its softmax over positions takes padding in, whose states a swapped model does not compute."""
    from transformers import BertForQuestionAnswering

    model = small(task="ForQuestionAnswering", num_labels=2)
    assert isinstance(model, BertForQuestionAnswering)
    where = dict(start_positions=torch.tensor([1, 0, 2]), end_positions=torch.tensor([3, 2, 4]))
    with torch.no_grad():
        theirs = model(**INPUTS, **where)
    try:
        refusals(dynplan.swap, model)
    except Refused as refused:
        assert not re.search(r"swap its bare encoder", str(refused)), "advises what gives another loss"
        return
    with torch.no_grad():
        ours = model(**INPUTS, **where)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.start_logits.argmax(1), theirs.start_logits.argmax(1))


@pytest.mark.parametrize("name", ["token_type_ids", "attention_mask"])
@torch.no_grad()
def test_one_row_for_all_samples(name):
    """Hugging Face spreads it over the batch, or refuses it."""
    model = small()
    one_row = torch.ones(1, MASK.shape[1], dtype=torch.long)
    inputs = {"input_ids": INPUTS["input_ids"], name: one_row}
    try:
        theirs = model(**inputs).logits
    except Exception:
        return
    torch.testing.assert_close(dynplan.swap(model)(**inputs).logits, theirs, rtol=1e-5, atol=1e-5)


def test_no_reference_is_left_to_tensors_that_were_replaced():
    """Weights that a model no longer has are freed at the next forward, at the latest."""
    import weakref

    model = dynplan.swap(small())
    answer(model)
    answer(model)
    old = weakref.ref(encoder_of(model).encoder.layer[0].output.dense.weight)
    encoder_of(model).encoder.layer[0].output.dense.weight = nn.Parameter(torch.zeros(32, 64))
    answer(model)
    answer(model)
    assert old() is None
