"""Gradients, dropout, gates and fresh weights: the swapped model under training."""

import copy
from functools import partial

import pytest
import torch
from integrations.models import KINDS, batch, encoder_of, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynplan
from dynplan.policies import FixedPath, KeepAll, RandomPath

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
LABELS = torch.tensor([0, 2, 1, 0, 2])


def planned_by_masking(model: nn.Module, inputs: dict, gates: Tensor):
    """The oracle: every layer computed for every sample, padded, and mixed with what went in by its gate."""
    encoder = encoder_of(model)
    allowed = inputs["attention_mask"][:, None, None, :].bool()

    def forward(hidden, attention_mask=None, **_):
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        for layer, gate in zip(encoder.encoder.layer, gates.unbind(1), strict=True):
            out = layer(hidden, allowed)
            gate = gate[:, None, None].to(hidden.dtype)
            hidden = gate * (out[0] if isinstance(out, tuple) else out) + (1 - gate) * hidden
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    encoder.encoder.forward = forward
    try:
        return model(**inputs, labels=LABELS)
    finally:
        del encoder.encoder.forward


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", ["all", "none", "paths"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_masked_oracle(kind, plan):
    keep = {"all": PATHS | True, "none": PATHS & False, "paths": PATHS}[plan]
    model, inputs = tiny(kind).double(), batch()
    oracle = copy.deepcopy(model)
    expected = planned_by_masking(oracle, inputs, keep)
    expected.loss.backward()
    ours = dynplan.swap(model, FixedPath(keep))(**inputs, labels=LABELS)
    ours.loss.backward()
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-11, atol=1e-11)
    theirs, mine = gradients(oracle), gradients(model)
    if plan == "none":
        assert not any(".layer." in name for name in mine)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine.get(name, torch.zeros_like(grad)), grad, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_training_mode_drops_out():
    model, inputs = dynplan.swap(tiny()).train(), batch()
    torch.manual_seed(0)
    first, second = model(**inputs).logits, model(**inputs).logits
    torch.manual_seed(0)
    assert torch.equal(first, model(**inputs).logits) and not torch.equal(first, second)


def test_training_along_random_paths_learns():
    model, inputs = dynplan.swap(tiny(), RandomPath(0.75)).train(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = copy.deepcopy(model).eval()(**inputs, labels=LABELS).loss
    for _ in range(15):
        optimizer.zero_grad()
        model(**inputs, labels=LABELS).loss.backward()
        optimizer.step()
    assert model.eval()(**inputs, labels=LABELS).loss < 0.7 * before


@pytest.mark.parametrize("form", ["tensor", "function", "stepwise"])
def test_gates_mix_and_learn(form):
    torch.manual_seed(3)
    model, inputs = tiny().double(), batch()
    gates = torch.rand(5, 4, dtype=torch.float64).round(decimals=1).requires_grad_()
    oracle = copy.deepcopy(model)
    planned_by_masking(oracle, inputs, gates).loss.backward()
    expected, gates.grad = gates.grad, None

    def stepwise(layer, request, hidden):
        assert hidden.shape == request.hidden.shape
        return gates[:, layer]

    stepwise.stepwise = True
    dynplan.swap(model)
    model.dynplan.gates = {"tensor": gates, "function": lambda request: gates, "stepwise": stepwise}[form]
    output = model(**inputs, labels=LABELS)
    output.loss.backward()
    torch.testing.assert_close(gates.grad, expected, rtol=1e-9, atol=1e-11)
    for name, grad in gradients(oracle).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-9, atol=1e-11)
    assert torch.equal(model.dynplan.last_plan, gates != 0)
    assert model.dynplan.gates is None
    model(**inputs)
    assert model.dynplan.last_plan.all()


@torch.no_grad()
def test_closed_gates_are_bypasses():
    model, inputs = dynplan.swap(tiny()), batch()
    model.dynplan.policy = FixedPath(PATHS)
    expected = model(**inputs).logits
    model.dynplan.gates = PATHS.float()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_gates_that_do_not_fit_are_refused():
    model, inputs = dynplan.swap(tiny()), batch()
    for gates in (torch.ones(5, 3), PATHS, lambda request: None):
        model.dynplan.gates = gates
        with pytest.raises(ValueError, match=r"expected gates to be a float tensor of shape \(5, 4\), got"):
            model(**inputs)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model, inputs = dynplan.swap(tiny().double(), FixedPath(PATHS)).train(), batch()
    kept = []
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs, labels=LABELS).loss.backward()
        kept.append({name: grad.clone() for name, grad in gradients(model).items()})
        for layer in model.bert.encoder.layer:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert kept[0].keys() == kept[1].keys()
    for name, grad in kept[0].items():
        torch.testing.assert_close(kept[1][name], grad, rtol=1e-12, atol=1e-14)


def test_frozen_embeddings_and_a_single_learning_layer():
    model, inputs = tiny().double(), batch()
    model.requires_grad_(False)
    encoder_of(model).encoder.layer[1].requires_grad_(True)
    oracle = copy.deepcopy(model)
    planned_by_masking(oracle, inputs, PATHS).loss.backward()
    dynplan.swap(model, FixedPath(PATHS))(**inputs, labels=LABELS).loss.backward()
    assert gradients(model).keys() == gradients(oracle).keys()
    for name, grad in gradients(oracle).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-9, atol=1e-11)


def _step(model):
    layer = encoder_of(model).encoder.layer[2]
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _load(model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _round_trip(model):
    model.to(torch.bfloat16).to(torch.float32)


def _replace_parameter(model):
    encoder_of(model).encoder.layer[0].intermediate.dense.weight = nn.Parameter(torch.ones(64, 32))


def _replace_module(model):
    encoder_of(model).encoder.layer[3].attention.self.key = nn.Linear(32, 32)


def _adapter(model):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, nn.Linear(32, 32)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    self = encoder_of(model).encoder.layer[1].attention.self
    self.value = Adapter(self.value)


def _hook(model):
    encoder_of(model).encoder.layer[1].output.dense.register_forward_hook(lambda module, args, out: out * 2)


@pytest.mark.parametrize(
    "change", [_step, _load, _round_trip, _replace_parameter, _replace_module, _adapter, _hook]
)
def test_changed_weights_are_taken_up(change):
    model, inputs = dynplan.swap(tiny()), batch()
    with torch.no_grad():
        before = model(**inputs).logits
    torch.manual_seed(5)
    change(model)
    with torch.no_grad():
        after = model(**inputs).logits
        expected = dynplan.unswap(model)(**inputs).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_refresh_after_a_write_that_leaves_no_trace():
    model, inputs = dynplan.swap(tiny()), batch()
    model(**inputs)
    encoder_of(model).encoder.layer[0].attention.self.query.weight.data.mul_(3)
    model.dynplan.refresh()
    after = model(**inputs).logits
    torch.testing.assert_close(after, dynplan.unswap(model)(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_model_made_under_inference_mode():
    with torch.inference_mode():
        model, inputs = tiny(), batch()
        expected = model(**inputs).logits
        torch.testing.assert_close(dynplan.swap(model)(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_inference_mode_and_no_grad_agree():
    model, inputs = dynplan.swap(tiny(), KeepAll()), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)


def test_sizes_are_read_once_where_the_plan_is_known(monkeypatch):
    reads, read = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or read(tensor))
    model, inputs = dynplan.swap(tiny(), FixedPath(PATHS)).train(), batch()
    model(**inputs, labels=LABELS).loss.backward()
    assert reads == [(4, 6)]  # the offsets of all layers
