"""The forward in one op: taken where everything is plain, left where anything is not, and never with other
bits than the long way."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
from integrations.models import KINDS, TASKS, batch, encoder_of, tiny
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

import dynplan
from dynplan.integrations.huggingface import fast_path, forward
from dynplan.integrations.huggingface.outputs import _plain_fields, new_output
from dynplan.nn import UpfrontPlanner
from dynplan.policies import FixedPath, HashPath, KeepAll, PlannerPolicy, RandomPath, StaticPath

KEEP = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1]]).bool()
POLICIES = {
    "all": KeepAll,
    "fixed": lambda: FixedPath(KEEP),
    "random": lambda: RandomPath(0.5, seed=3),
    "static": lambda: StaticPath({2: [0, 3]}, 0.5),
    "hash": lambda: HashPath(0.5),
}


@pytest.fixture(autouse=True)
def threads(one_thread):
    pass


@pytest.fixture
def calls(monkeypatch):
    """How often the op has run."""
    seen = []

    def encode_tokens(*arguments):
        result = original(*arguments)
        seen.append(1)
        return result

    original = fast_path.encode_tokens
    monkeypatch.setattr(fast_path, "encode_tokens", encode_tokens)
    return seen


def is_whole(model, calls, **options):
    """Whether a forward takes one op."""
    calls.clear()
    with torch.no_grad():
        model(**batch() | options)
    return bool(calls)


@torch.no_grad()
def long_way(model, monkeypatch, **inputs):
    with monkeypatch.context() as patch:
        patch.setattr(forward, "run_fast", lambda *_: None)
        return model(**inputs)


def equal(one, two):
    assert type(one) is type(two) and list(one) == list(two) and vars(one).keys() == vars(two).keys()
    return all(torch.equal(part, two[name]) for name, part in one.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "electra"])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_every_model(kind, task, calls, monkeypatch):
    model = dynplan.swap(tiny(kind, task))
    assert is_whole(model, calls)
    inputs = batch()
    types = torch.zeros_like(inputs["input_ids"])
    for given in (inputs, inputs | {"token_type_ids": types}, {"input_ids": inputs["input_ids"]}):
        assert equal(model(**given), long_way(model, monkeypatch, **given))
    whole_tuple = model(**inputs, return_dict=False)
    assert isinstance(whole_tuple, tuple)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_every_policy(policy, side, calls, monkeypatch):
    model = dynplan.swap(tiny(task="ForTokenClassification"), POLICIES[policy]())
    assert is_whole(model, calls)
    inputs = batch(side=side)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        model.dynplan.policy = POLICIES[policy]()
        ours, plan = model(**given), model.dynplan.last_plan
        assert model.dynplan.last_plan is plan, "made once"
        model.dynplan.policy = POLICIES[policy]()
        assert equal(ours, long_way(model, monkeypatch, **given))
        assert torch.equal(plan, model.dynplan.last_plan)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@torch.no_grad()
def test_reduced_weights(weights, calls, monkeypatch):
    model = dynplan.swap(tiny(), weights=weights)
    assert is_whole(model, calls)
    assert equal(model(**batch()), long_way(model, monkeypatch, **batch()))


def test_left_where_something_is_not_plain(calls):
    model = dynplan.swap(tiny())
    encoder, controller = encoder_of(model), model.dynplan
    first = encoder.encoder.layer[0]
    assert is_whole(model, calls)
    assert not is_whole(model, calls, output_hidden_states=True)
    assert not is_whole(model, calls, position_ids=torch.arange(9).expand(5, 9))
    assert not is_whole(model, calls, attention_mask=batch()["attention_mask"].float())
    ids = batch()["input_ids"]
    assert not is_whole(model, calls, input_ids=None, inputs_embeds=encoder.embeddings.word_embeddings(ids))

    def hook(module):
        return module.register_forward_hook(lambda *_: None).remove

    def setting(owner, name, value):
        before = getattr(owner, name)
        setattr(owner, name, value)
        return lambda: setattr(owner, name, before)

    for change in (
        lambda: hook(first.output.dense),
        lambda: hook(encoder.embeddings.LayerNorm),
        lambda: setting(encoder.config, "output_hidden_states", True),
        lambda: setting(encoder.config, "return_dict", False),
        lambda: setting(encoder, "config", copy.deepcopy(encoder.config)) and hook(first.output.dense),
        lambda: setting(first.output, "dense", nn.Sequential(first.output.dense)),
        lambda: setting(
            encoder.embeddings, "word_embeddings", nn.Sequential(encoder.embeddings.word_embeddings)
        ),
        lambda: setting(controller, "policy", PlannerPolicy(UpfrontPlanner(32, 4), 0.5)),
    ):
        undo = change()
        if encoder.config.return_dict:
            assert not is_whole(model, calls)
        undo()
        assert is_whole(model, calls)
    model.train()
    model(**batch())
    model.eval()
    assert is_whole(model, calls)
    model(**batch())
    assert len(calls) == 1, "gradients"
    model.double()
    assert not is_whole(model, calls)
    model.float()
    assert is_whole(model, calls)


@torch.no_grad()
def test_every_change_is_seen(calls, monkeypatch):
    model = dynplan.swap(tiny())
    encoder = encoder_of(model)
    layer, words = encoder.encoder.layer[1], encoder.embeddings.word_embeddings
    other = tiny(seed=1)

    def shifted(weight):
        return nn.Parameter(weight + 0.1)

    changes = {
        "in place": lambda: layer.output.dense.weight.add_(0.1),
        "words in place": lambda: words.weight.mul_(1.1),
        "data": lambda: setattr(words.weight, "data", words.weight + 0.1),
        "parameter": lambda: setattr(
            layer.intermediate.dense, "bias", shifted(layer.intermediate.dense.bias)
        ),
        "table": lambda: setattr(words, "weight", shifted(words.weight)),
        "module": lambda: setattr(encoder.encoder.layer, "2", encoder_of(other).encoder.layer[2]),
        "norm": lambda: setattr(encoder.embeddings.LayerNorm, "eps", 0.5),
        "state": lambda: model.load_state_dict(other.state_dict()),
        "embeddings": lambda: setattr(
            encoder, "embeddings", copy.deepcopy(encoder_of(tiny(seed=2)).embeddings)
        ),
        "fewer layers": lambda: encoder.encoder.layer.__delitem__(3),
        "more layers": lambda: encoder.encoder.layer.append(encoder_of(other).encoder.layer[0]),
    }
    for name, change in changes.items():
        assert is_whole(model, calls), name
        before = model(**batch())
        change()
        after = model(**batch())
        assert equal(after, long_way(model, monkeypatch, **batch())), name
        assert not equal(before, after), name
    assert is_whole(model, calls)


@torch.no_grad()
def test_errors_are_those_of_the_long_way(calls):
    model = dynplan.swap(tiny(), FixedPath(KEEP))
    assert is_whole(model, calls)
    inputs = batch()
    wrong = inputs["attention_mask"].clone()
    wrong[0, 0] = 0
    for change, error, text in (
        ({"input_ids": inputs["input_ids"] + 100}, IndexError, "dynplan: expected input_ids within 0..96"),
        (
            {"input_ids": inputs["input_ids"][0]},
            ValueError,
            "dynplan: expected input_ids of shape|attention_mask",
        ),
        ({"attention_mask": inputs["attention_mask"][:2]}, ValueError, r"attention_mask of shape \(B, S\)"),
        ({"attention_mask": wrong}, NotImplementedError, "the first token of every sample"),
        ({"attention_mask": wrong * 2}, ValueError, "to hold only 0 and 1, got 2"),
        (
            {name: tensor[:3] for name, tensor in inputs.items()},
            ValueError,
            r"FixedPath: .* \(3, 4\), got \(5, 4\)",
        ),
    ):
        with pytest.raises(error, match=text):
            model(**inputs | change)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_outlive_the_model(calls):
    model = dynplan.swap(tiny(task="Model"))
    assert is_whole(model, calls)
    inputs = tuple(batch().values())
    states = model(*inputs)[0]
    traced = torch.jit.trace(model, inputs, strict=False)
    del model
    gc.collect()
    torch.testing.assert_close(traced(*inputs)["last_hidden_state"], states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_look_for_themselves(calls):
    model = dynplan.swap(tiny())
    assert is_whole(model, calls)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_whole(other, calls)
        encoder_of(other).encoder.layer[0].output.dense.weight.add_(1)
        assert not equal(other(**batch()), model(**batch()))
    dynplan.unswap(model)
    theirs = model(**batch()).logits
    torch.testing.assert_close(dynplan.swap(model)(**batch()).logits, theirs, rtol=1e-3, atol=1e-3)


def test_outputs_are_those_of_transformers():
    states = torch.zeros(2, 3)
    for kind in (BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions):
        assert _plain_fields(kind) is not None, "made without its checks"
        for values in ({"hidden_states": None}, {"hidden_states": (states,)}):
            makes = (partial(new_output, kind), kind)
            made, wanted = (make(last_hidden_state=states, **values) for make in makes)
            assert type(made) is kind and vars(made) == vars(wanted)
            assert list(made.items()) == list(wanted.items()) and made.to_tuple() == wanted.to_tuple()
            assert torch.utils._pytree.tree_flatten(made)[0] == torch.utils._pytree.tree_flatten(wanted)[0]
            copied = copy.deepcopy(made)
            assert type(copied) is kind and copied.keys() == wanted.keys()
