"""``swap(model, weights="int8" | "bfloat16")``."""

import copy
import pickle

import pytest
import torch
from integrations.models import KINDS, batch, encoder_of, tiny
from integrations.test_minilm import minilm  # noqa: F401  a fixture

import dynplan
from dynplan.policies import FixedPath, KeepAll

WEIGHTS = ["int8", "bfloat16"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_near_the_original_and_back(kind, weights):
    model, inputs = tiny(kind), batch()
    keys, original = list(model.state_dict()), model(**inputs).logits
    assert dynplan.swap(model, weights=weights) is model
    assert model.dynplan.weights == weights and weights in repr(model.dynplan)
    swapped = model(**inputs).logits
    assert 0 < (swapped - original).norm() < 0.15 * original.norm()
    assert list(model.state_dict()) == keys
    assert torch.equal(dynplan.unswap(model)(**inputs).logits, original)


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_bypassed_samples_keep_their_bits(weights):
    model, inputs = tiny(task="Model"), batch()
    path = torch.ones(5, 4, dtype=torch.bool)
    path[2] = False
    dynplan.swap(model, FixedPath(path), weights=weights)
    result = model(**inputs, output_hidden_states=True)
    assert torch.equal(result.last_hidden_state[2, :1], result.hidden_states[0][2, :1])
    model.dynplan.policy = FixedPath(torch.zeros(4, dtype=torch.bool))
    mask = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).last_hidden_state[mask], result.hidden_states[0][mask])


@torch.no_grad()
def test_weights_that_change_are_packed_again():
    model, inputs = dynplan.swap(tiny(), weights="int8"), batch()
    before = model(**inputs).logits
    encoder_of(model).encoder.layer[0].output.dense.weight.mul_(3)
    after = model(**inputs).logits
    assert not torch.allclose(before, after)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.dynplan.weights == "int8" and torch.equal(twin(**inputs).logits, after)


@torch.no_grad()
def test_not_saved(tmp_path):
    model, inputs = tiny(), batch()
    dynplan.swap(model, weights="int8").save_pretrained(tmp_path)
    assert dynplan.from_pretrained(tmp_path).dynplan.weights is None
    again = dynplan.from_pretrained(tmp_path, weights="int8")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_refused_at_swap():
    with pytest.raises(ValueError, match="swap: expected weights to be None, bfloat16 or int8, got 'int4'"):
        dynplan.swap(tiny(), weights="int4")
    with pytest.raises(
        ValueError, match=r"weights=None for a model in torch.float64 on cpu, got 'int8'; move it"
    ):
        dynplan.swap(tiny().double(), weights="int8")
    with pytest.raises(ValueError, match="weights=None for a model in torch.float32 on meta, got 'int8'"):
        dynplan.swap(tiny().to("meta"), weights="int8")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: model.train(), "attention.self is in training mode"),
        (lambda model: model.double(), "weights are torch.float64"),
        (lambda model: setattr(model.dynplan, "gates", torch.ones(5, 4)), "gates are set"),
        (
            lambda model: model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None),
            "output.dense: expected Linear with its own forward and without hooks",
        ),
    ],
)
def test_refused_at_the_call(change, text):
    model = dynplan.swap(tiny(), weights="int8")
    change(model)
    remedy = r"; the model was swapped with weights='int8': call dynplan.unswap\(model\)"
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="a forward for the kernels.*" + text + ".*" + remedy),
    ):
        model(**batch())


def test_gradients_are_refused():
    model = dynplan.swap(tiny(), weights="bfloat16")
    with pytest.raises(RuntimeError, match="gradients are recorded"):
        model(**batch())
    with torch.inference_mode():
        model(**batch())


@pytest.mark.demo
@pytest.mark.parametrize(("weights", "share"), [("int8", 0.12), ("bfloat16", 0.02)])
@torch.no_grad()
def test_real_weights(minilm, weights, share):  # noqa: F811
    model, inputs = copy.deepcopy(minilm[0]), minilm[1]
    real = inputs["attention_mask"].bool()
    exact = model(**inputs).last_hidden_state[real]
    got = dynplan.swap(model, KeepAll(), weights=weights)(**inputs).last_hidden_state[real]
    assert (got - exact).norm() < share * exact.norm()
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.99
