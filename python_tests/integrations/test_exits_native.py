"""Decisions in native code: those of the policy in PyTorch, which stays the reference."""

import threading

import pytest
import torch
from integrations.models import tiny
from integrations.test_exits import LAYERS, POLICIES, exits_of, inputs_of, policy_of, swapped
from torch import nn

import dynplan
from dynplan.integrations.huggingface import fast_path
from dynplan.policies import ConfidenceExit, EntropyExit, LearnedExit, PatienceExit

THRESHOLDS = {ConfidenceExit: 0.6, EntropyExit: -0.8, PatienceExit: 1, LearnedExit: 1.5}


@pytest.fixture
def calls(monkeypatch):
    """The plans that native code decided."""
    seen, op = [], fast_path.encode_until_sure

    def spy(*arguments):
        done = op(*arguments)
        seen.append(done[1])
        return done

    monkeypatch.setattr(fast_path, "encode_until_sure", spy)
    return seen


def both(model, texts, budget, monkeypatch):
    """Logits, plans and the stream's counts: in native code, and in PyTorch."""
    found = []
    for native in (True, False):
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(fast_path, "_run_exits", lambda *_: None)
            model.dynplan.budget = budget()
            seen = [(model(**inputs).logits, model.dynplan.last_plan) for inputs in texts]
            state = getattr(model.dynplan.budget, "state", None)
        found.append(([one[0] for one in seen], [one[1] for one in seen], state))
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta"])
@pytest.mark.parametrize("chain", [(1, 2, 3, 4), (2, 4), (1, 3), (3,)])
@torch.no_grad()
def test_equals_the_policy_in_pytorch(policy, kind, chain, calls, monkeypatch):
    threshold = THRESHOLDS[policy]
    options = (
        {"embedding_size": 32} if kind == "electra" else {}
    )  # no projection, which takes the way op by op
    _, model = swapped(kind, policy_of(policy, chains=(chain,), threshold=threshold), **options)
    texts = [inputs_of(seed=seed) for seed in range(3)] + [inputs_of((length,), 9) for length in (1, 8)]
    texts[0]["attention_mask"][2] = 0
    budgets = [lambda share=share: share for share in (1.0, 0.8, 0.5, 0.3, 0.1, 0.0)]
    budgets += [lambda share=share: dynplan.StreamBudget(share, burst=2) for share in (0.0, 0.3, 0.75, 1.0)]
    for budget in budgets:
        calls.clear()
        (logits, plans, state), (logits_2, plans_2, state_2) = both(model, texts, budget, monkeypatch)
        assert len(calls) == len(texts), "native code did decide"
        assert all(map(torch.equal, plans, plans_2)) and state == state_2
        torch.testing.assert_close(logits, logits_2, rtol=1e-5, atol=1e-5)
        assert model.dynplan.why_not_fused is None


@torch.no_grad()
def test_regression(calls, monkeypatch):
    policy = ConfidenceExit(exits_of(regression=True), 1.0, [[1, 3, 4]], [0] * 5, [[0.0] * 5])
    _, model = swapped(policy=policy, num_labels=1)
    texts = [inputs_of(seed=seed) for seed in range(6)]
    (logits, plans, _), (logits_2, plans_2, _) = both(model, texts, lambda: 1.0, monkeypatch)
    assert len(calls) == 6 and len(set(torch.cat(plans).sum(1).tolist())) > 1
    assert all(map(torch.equal, plans, plans_2))
    torch.testing.assert_close(logits, logits_2, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reduced_weights(calls, monkeypatch):
    model = dynplan.swap(tiny("bert"), policy_of(), weights="bfloat16")
    (logits, plans, _), (logits_2, plans_2, _) = both(model, [inputs_of()], lambda: 0.75, monkeypatch)
    assert len(calls) == 1 and torch.equal(plans[0], plans_2[0])
    torch.testing.assert_close(logits, logits_2, rtol=1e-3, atol=1e-3)


def change_classifier(model):
    model.classifier = nn.Sequential(nn.Linear(32, 3), nn.Tanh())


def train_in_place(model):
    with torch.no_grad():
        model.classifier.weight.add_(0.5)
        model.dynplan.planner.heads[0].weight.mul_(0.7)


def write_past_the_counters(model):
    for tensor in (model.classifier.weight, model.bert.pooler.dense.weight):
        tensor.data.normal_(std=0.4)


def other_activation(model):
    model.bert.pooler.activation = nn.ReLU()


def hooked(model):
    model.classifier.register_forward_hook(lambda module, inputs, output: output * 2 + 1)


def other_exits(model):
    model.dynplan.policy = policy_of(seed=5)


def scaled_forward(model):
    own = model.classifier.forward
    model.classifier.forward = lambda states: own(states) * 3


def other_class_of_exit(model):
    class Twice(nn.Linear):
        def forward(self, states):
            return super().forward(states) * -2

    exits, other = model.dynplan.planner, Twice(32, 32)
    other.load_state_dict(exits.heads[0].state_dict())
    exits.heads[0] = other


def exits_own_forward(model):
    model.dynplan.planner.heads[0].forward = lambda states: states * 0


def exits_of_another_class(model):
    class Never(dynplan.nn.Exits):
        def sureness(self, index, answers, pooled):
            return torch.zeros(len(answers))

    exits = Never(32, LAYERS, (1, 2, 3))
    exits.load_state_dict(model.dynplan.planner.state_dict())
    model.dynplan.policy.planner = exits


def own_sureness(model):
    model.dynplan.policy.sureness = lambda index, answers, pooled, request: torch.zeros(len(answers))


def head_grows(model):
    model.classifier = nn.Sequential(model.classifier)
    model(**inputs_of())
    model.classifier.append(nn.Hardtanh())


def scaled_by_an_attribute(model):
    class Scaled(type(model)):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits * self.scale
            return output

    model.__class__, model.scale = Scaled, 1.0
    model(**inputs_of())
    model.scale = 0.3


def temperature_below_zero(model):
    model.dynplan.planner.temperatures.fill_(-1.0)


CHANGES = (
    change_classifier,
    train_in_place,
    write_past_the_counters,
    other_activation,
    hooked,
    other_exits,
    scaled_forward,
    other_class_of_exit,
    exits_own_forward,
    exits_of_another_class,
    own_sureness,
    head_grows,
    scaled_by_an_attribute,
    temperature_below_zero,
)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_heads(change, monkeypatch):
    """Whatever becomes of the head after a forward, native code answers as the head does, or stands back."""
    _, model = swapped(policy=policy_of(threshold=0.7))
    texts = [inputs_of(seed=seed) for seed in range(4)]
    before = both(model, texts, lambda: 0.8, monkeypatch)[0]
    change(model)
    (logits, plans, _), (logits_2, plans_2, _) = both(model, texts, lambda: 0.8, monkeypatch)
    assert all(map(torch.equal, plans, plans_2))
    torch.testing.assert_close(logits, logits_2, rtol=1e-4, atol=1e-4)
    changed = [not torch.equal(one, other) for one, other in zip(plans, before[1], strict=True)]
    assert any(changed) or not all(map(torch.allclose, logits, before[0])), "the change is one"


@torch.no_grad()
def test_zeros_are_every_activation(calls, monkeypatch):
    """Where a head's answers do not tell what is between its maps, training them is seen."""
    _, model = swapped("electra", policy_of(threshold=0.7), embedding_size=32)
    for tensor in model.classifier.out_proj.parameters():
        tensor.zero_()
    model(**inputs_of())
    assert calls
    for tensor in model.classifier.out_proj.parameters():
        tensor.normal_()
    (logits, plans, _), (logits_2, plans_2, _) = both(model, [inputs_of()], lambda: 0.8, monkeypatch)
    assert calls and torch.equal(plans[0], plans_2[0])
    torch.testing.assert_close(logits, logits_2, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_subclass_decides_for_itself(calls):
    class Never(ConfidenceExit):
        def sureness(self, index, answers, pooled, request):
            return torch.zeros(len(answers))

    _, model = swapped(policy=policy_of(Never, threshold=0.5))
    model(**inputs_of())
    assert not calls and model.dynplan.last_plan.all()


@torch.no_grad()
def test_threads_share_a_stream():
    _, model = swapped(policy=policy_of(threshold=2.0))
    stream = model.dynplan.budget = dynplan.StreamBudget(0.5, burst=1)

    def work(seed):
        for step in range(20):
            model(**inputs_of(seed=100 * seed + step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    state = stream.state
    assert state["samples"] == 4 * 20 * 6
    assert state["sample_layers"] <= 0.5 * LAYERS * state["samples"] + LAYERS + 1e-6
    assert state["sample_layers"] > 0.45 * LAYERS * state["samples"]


@torch.no_grad()
def test_an_error_counts_nothing():
    _, model = swapped()
    stream = model.dynplan.budget = dynplan.StreamBudget(0.5)
    inputs = inputs_of()
    inputs["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError, match="expected input_ids within"):
        model(**inputs)
    assert stream.state["samples"] == 0


class Mean(dynplan.StreamBudget):
    """Lets nobody on beyond the first exit."""

    def take(self, priority, wanted, cu_seqlens, steps, num_layers):
        return wanted & (cu_seqlens.diff() > 0) & (steps == 1)


@torch.no_grad()
def test_what_native_code_leaves_to_pytorch(calls, monkeypatch):
    _, model = swapped(policy=policy_of(threshold=2.0))
    model.dynplan.budget = Mean(1.0)
    model(**inputs_of())
    assert model.dynplan.last_plan.sum(1).tolist() == [1] * 6
    model.dynplan.budget = None
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs_of())
    model.classifier.train()
    model.dropout = nn.AlphaDropout(0.5)
    model(**inputs_of())
    for regression, labels in ((False, 1), (True, 3)):
        policy = policy_of(PatienceExit, regression=regression, threshold=1)
        model = dynplan.swap(tiny("bert", num_labels=labels), policy)
        both(model, [inputs_of()], lambda: 0.8, monkeypatch)
    model = dynplan.swap(tiny("bert", "Model"), policy_of(chains=((3,),)))
    assert model(**inputs_of()).last_hidden_state.isfinite().all(), (
        "no head is asked where there is one depth"
    )
    assert not calls


@torch.no_grad()
def test_default_dtype_and_device(calls):
    _, model = swapped()
    torch.set_default_dtype(torch.float64)
    try:
        model(**inputs_of())
    finally:
        torch.set_default_dtype(torch.float32)
    model.dynplan.refresh()
    inputs = inputs_of()
    with torch.device("meta"):
        model(**inputs)
    assert len(calls) == 2
