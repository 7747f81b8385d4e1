"""The user is told where the kernels stand back, once, and can ask at any time."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import batch, tiny
from torch import nn

import dynplan
from dynplan.policies import KeepAll, RandomPath

pytestmark = pytest.mark.usefixtures("one_thread")


def ask(model, grad=False):
    """Warnings of one forward."""
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(grad):
        warnings.simplefilter("always")
        model(**batch())
    return [str(warning.message) for warning in caught]


def test_nothing_to_tell():
    model = dynplan.swap(tiny())
    assert model.dynplan.why_not_fused is None
    for policy in (KeepAll(), RandomPath(0.5)):
        model.dynplan.policy = policy
        assert not ask(model)
        assert model.dynplan.why_not_fused is None


def test_hooks_of_transformers_sleep():
    model = tiny(task="Model")
    with torch.no_grad():
        theirs = model(**batch(), output_hidden_states=True).last_hidden_state
    assert model.encoder.layer[0]._forward_hooks
    dynplan.swap(model)
    assert not ask(model) and model.dynplan.why_not_fused is None
    with torch.no_grad():
        ours = model(**batch(), output_hidden_states=True)
    assert len(ours.hidden_states) == 5
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(ours.last_hidden_state[real], theirs[real], rtol=1e-4, atol=1e-4)


class Mean(nn.Module):
    def forward(self, hidden):
        return hidden.mean(1)


REASONS = {
    "hook": (lambda model: model.bert.encoder.layer[1].register_forward_hook(lambda *_: None), "layer 1: "),
    "adapter": (
        lambda model: setattr(model.bert.encoder.layer[2].output, "dense", nn.Sequential(nn.Linear(64, 32))),
        "layer 2: output.dense: expected Linear",
    ),
    "dropout": (
        lambda model: model.bert.encoder.layer[0].output.dropout.train(),
        "output.dropout is in train",
    ),
    "double": (lambda model: model.double(), "weights are torch.float64"),
    "pooler": (lambda model: setattr(model.bert, "pooler", Mean()), "the pooler: expected BertPooler"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_told_once(change, reason):
    model = dynplan.swap(tiny())
    ask(model)
    change(model)
    told = ask(model)
    assert len(told) == 1 and reason in told[0] and "not the kernels" in told[0]
    assert reason in model.dynplan.why_not_fused
    assert not ask(model)


def test_gradients_that_nobody_asked_for():
    model = dynplan.swap(tiny())
    (told,) = ask(model, grad=True)
    assert "torch.no_grad()" in told and "torch.no_grad()" in model.dynplan.why_not_fused
    assert not ask(model.train(), grad=True), "training wants them"
    model.eval().requires_grad_(False)
    assert not ask(model, grad=True)
    assert model.dynplan.why_not_fused is None


@pytest.mark.parametrize("weights", [None, "int8", "bfloat16"])
@torch.no_grad()
def test_float16_weights_run_on_the_kernels(weights):
    model = tiny(task="Model").half()
    exact, theirs = copy.deepcopy(model).double()(**batch())[0], copy.deepcopy(model)(**batch())[0]
    ours = dynplan.swap(model, weights=weights)(**batch())[0]
    assert model.dynplan.why_not_fused is None
    assert ours.dtype == torch.float16
    real = batch()["attention_mask"].bool()
    if weights is None:
        assert_close_to_exact(ours[real], theirs[real], exact[real])
    else:
        assert (ours[real] - exact[real]).norm() < 0.3 * exact[real].norm()
    states = model(**batch(), output_hidden_states=True).hidden_states
    assert all(state.dtype == torch.float16 for state in states)


class Wrapper(nn.Module):
    """As sentence-transformers keeps an encoder."""

    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"auto_model": model})


def test_advice_works():
    wrapper = Wrapper(tiny(task="Model"))
    with pytest.raises(TypeError, match=r"got Wrapper; it holds a BertModel: .*'inner.auto_model'"):
        dynplan.swap(wrapper)
    assert dynplan.swap(wrapper.get_submodule("inner.auto_model")).dynplan.num_layers == 4
    with pytest.raises(TypeError, match="got Linear$"):
        dynplan.swap(nn.Linear(2, 2))


@torch.no_grad()
def test_a_head_that_reads_padding():
    model = dynplan.swap(tiny(task="ForQuestionAnswering", num_labels=2))
    (told,) = ask(model)
    assert "the head reads padding" in told and "the head reads padding" in model.dynplan.why_not_fused
    inputs = batch((9, 9))
    for given in (inputs, dict(input_ids=inputs["input_ids"])):
        model(**given)
        assert model.dynplan.why_not_fused is None
    reduced = dynplan.swap(tiny(task="ForQuestionAnswering", num_labels=2), weights="int8")
    reduced(**inputs)
    with pytest.raises(RuntimeError, match="expected a forward for the kernels, .* reads padding"):
        reduced(**batch())


@torch.no_grad()
def test_one_row_of_a_mask_or_of_types_serves_all():
    model, inputs = tiny(task="Model"), batch()
    given = dict(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"][:1],
        token_type_ids=torch.ones(1, 9, dtype=torch.long),
        special_tokens_mask=torch.zeros(5, 9),
    )
    theirs = model(**{name: value for name, value in given.items() if name != "special_tokens_mask"})[0]
    torch.testing.assert_close(dynplan.swap(model)(**given)[0], theirs, rtol=1e-4, atol=1e-4)
