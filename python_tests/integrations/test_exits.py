"""Policies with exits: a sample's answer is what its exit makes of exactly the layers that it ran."""

import copy
import pickle

import pytest
import torch
from integrations.models import batch, encoder_of, run_alone, tiny
from torch import nn

import dynplan
from dynplan.nn import Exits
from dynplan.policies import (
    ConfidenceExit,
    EntropyExit,
    HashExit,
    KeepAll,
    LearnedExit,
    PatienceExit,
    RandomExit,
    RandomPath,
)

POLICIES = (ConfidenceExit, EntropyExit, PatienceExit, LearnedExit)
KINDS = ("bert", "roberta", "electra")
LAYERS, WIDTH = 4, 32


def exits_of(depths=(1, 2, 3), regression=False, seed=0):
    torch.manual_seed(seed)
    exits = Exits(WIDTH, LAYERS, depths, regression)
    for parameter in exits.parameters():
        nn.init.normal_(parameter, std=0.3)
    return exits


def policy_of(kind=ConfidenceExit, budget=1.0, chains=((1, 3, 4),), threshold=0.6, **options):
    """A policy that leaves with a sureness of ``threshold`` at every budget."""
    return kind(exits_of(**options), budget, chains, [0] * 5, [[threshold] * 5 for _ in chains])


def swapped(kind="bert", policy=None, **options):
    model = tiny(kind, **options)
    return copy.deepcopy(model), dynplan.swap(model, policy or policy_of())


def own_head(model, states):
    """What the original's head answers where it finds ``states`` ``(1, H)`` in first position."""
    handle = encoder_of(model).encoder.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", states.unsqueeze(1))
    )
    try:
        return model(input_ids=torch.full((1, 1), 5)).logits
    finally:
        handle.remove()


@torch.no_grad()
def expected(original, exits, inputs, plan):
    """Each sample alone: its layers in the original, then the exit's head and the original's."""
    rows = []
    for ids, mask, path in zip(inputs["input_ids"], inputs["attention_mask"], plan, strict=True):
        ids = ids[mask.bool()]
        depth = int(path.sum())
        assert path[:depth].all(), "a prefix"
        if depth == LAYERS:
            rows.append(original(input_ids=ids.unsqueeze(0)).logits)
            continue
        states = run_alone(encoder_of(original), ids, path).last_hidden_state
        if depth == 0:
            rows.append(own_head(original, states[:, 0]))
        else:
            rows.append(own_head(original, exits.heads[exits.depths.index(depth)](states.mean(1))))
    return torch.cat(rows)


def assert_right(original, model, inputs, **close):
    logits = model(**inputs).logits
    plan = model.dynplan.last_plan
    torch.testing.assert_close(
        logits, expected(original, model.dynplan.planner, inputs, plan), rtol=1e-4, atol=1e-4, **close
    )
    return plan


def inputs_of(lengths=(9, 3, 1, 7, 5, 12), seed=1):
    return batch(lengths, seed=seed)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_sample_alone(kind, policy):
    threshold = {ConfidenceExit: 0.6, EntropyExit: -0.8, PatienceExit: 1, LearnedExit: 1.5}[policy]
    original, model = swapped(kind, policy_of(policy, chains=((1, 2, 3, 4),), threshold=threshold))
    depths = set()
    for seed in range(6):
        plan = assert_right(original, model, inputs_of(seed=seed))
        depths |= set(plan.sum(1).tolist())
    assert model.dynplan.why_not_fused is None
    assert len(depths) > 1, "the samples do differ"


@torch.no_grad()
def test_own_modules_packed_padded_and_with_gradients():
    original, model = swapped()
    inputs = inputs_of()
    plan = assert_right(original, model, inputs)
    with torch.enable_grad():
        logits = model(**inputs).logits
        logits.sum().backward()
    assert torch.equal(model.dynplan.last_plan, plan) and "gradients" in model.dynplan.why_not_fused
    torch.testing.assert_close(
        logits.detach(), expected(original, model.dynplan.planner, inputs, plan), rtol=1e-4, atol=1e-4
    )
    assert model.dynplan.planner.heads[0].weight.grad is not None
    for side in (original, model):
        encoder_of(side).encoder.layer[1].register_forward_hook(lambda *_: None)
    assert torch.equal(assert_right(original, model, inputs), plan)
    assert "hook" in model.dynplan.why_not_fused


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5, 0.3])
@torch.no_grad()
def test_contract(budget):
    original, model = swapped(policy=policy_of(threshold=1.1))
    model.dynplan.budget = budget
    for seed in range(5):
        inputs = inputs_of(seed=seed)
        plan = assert_right(original, model, inputs)
        lengths = inputs["attention_mask"].sum(1)
        assert plan.sum() <= budget * plan.numel() + 1e-6
        assert (plan.sum(1) * lengths).sum() <= budget * lengths.sum() * LAYERS + 1e-6
    if budget == 1:
        assert plan.all(), "nobody is sure, everything is paid for"


@torch.no_grad()
def test_the_least_sure_go_on():
    original, model = swapped(policy=policy_of(chains=((1, 4),), depths=(1,), threshold=2.0))
    inputs = inputs_of((6,) * 6)
    exits = model.dynplan.planner
    model.dynplan.budget = 0.25
    first = model(**inputs).logits
    assert model.dynplan.last_plan.sum() == 6
    model.dynplan.budget = 0.25 + 2 * 3 / 24
    plan = assert_right(original, model, inputs)
    sure = (first / exits.temperatures[0]).softmax(1).amax(1)
    assert set((plan.sum(1) == LAYERS).nonzero().flatten().tolist()) == set(sure.argsort()[:2].tolist())


@torch.no_grad()
def test_one_text_and_a_stream():
    """At batch 1 a budget per batch leaves one depth for all; a stream's lets them differ."""
    original, model = swapped(policy=policy_of(threshold=0.6))
    texts = [inputs_of((length,), seed) for seed in range(10) for length in (4, 9)]
    model.dynplan.budget = 0.75
    assert {int(assert_right(original, model, text).sum()) for text in texts} == {3}
    model.dynplan.budget = dynplan.StreamBudget(0.75, burst=2)
    plans = torch.cat([assert_right(original, model, text) for text in texts])
    state = model.dynplan.budget.state
    assert len(set(plans.sum(1).tolist())) > 1
    assert state["samples"] == len(texts) and state["sample_layers"] == plans.sum()
    assert plans.sum() <= 0.75 * plans.numel() + 2 * LAYERS


@torch.no_grad()
def test_a_stream_of_batches():
    original, model = swapped(policy=policy_of(threshold=2.0))
    stream = model.dynplan.budget = dynplan.StreamBudget(0.5, burst=1)
    for seed in range(8):
        assert_right(original, model, inputs_of(seed=seed))
        state = stream.state
        assert state["sample_layers"] <= 0.5 * LAYERS * state["samples"] + LAYERS + 1e-6
        assert state["token_layers"] <= 0.5 * LAYERS * state["tokens"] + LAYERS * state["longest"] + 1e-6
    assert state["samples"] == 8 * 6


@torch.no_grad()
def test_policies_without_a_stream_keep_its_share():
    _, model = swapped(policy=RandomPath())
    stream = model.dynplan.budget = dynplan.StreamBudget(0.5)
    for seed in range(3):
        model(**inputs_of(seed=seed))
        assert model.dynplan.last_plan.sum() <= 0.5 * 6 * LAYERS
    assert stream.state["samples"] == 18
    model.dynplan.policy = KeepAll()
    with pytest.raises(ValueError, match="expected a policy that takes a budget at budget 0.5"):
        model(**inputs_of())


@torch.no_grad()
def test_regression():
    policy = ConfidenceExit(exits_of(regression=True), 1.0, [[1, 3, 4]], [0] * 5, [[0.0] * 5])
    original, model = swapped(policy=policy, num_labels=1)
    depths = set()
    for seed in range(6):
        depths |= set(assert_right(original, model, inputs_of(seed=seed)).sum(1).tolist())
    assert len(depths) > 1


@torch.no_grad()
def test_hidden_states_samples_without_tokens_and_uncalibrated():
    original, model = swapped()
    inputs = inputs_of()
    plan = assert_right(original, model, inputs)
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(model.dynplan.last_plan, plan)
    inputs["attention_mask"][2] = 0
    assert model(**inputs).logits.isfinite().all() and not model.dynplan.last_plan[2].any()
    model.dynplan.policy = ConfidenceExit(exits_of())
    assert_right(original, model, inputs_of())
    assert model.dynplan.last_plan.all(), "whoever the budget pays for goes on"


@torch.no_grad()
def test_narrow_types():
    _, model = swapped()
    inputs = inputs_of()
    logits, plan = model(**inputs).logits, model.dynplan.last_plan
    for dtype in (torch.bfloat16, torch.float64):
        _, other = swapped()
        other.to(dtype)
        got = other(**inputs).logits
        same = (other.dynplan.last_plan == plan).all(1)
        assert same.sum() >= 4
        torch.testing.assert_close(got[same].float(), logits[same], rtol=0.1, atol=0.3)


@torch.no_grad()
def test_saved_copied_and_pickled(tmp_path):
    original, model = swapped(policy=policy_of(budget=0.9))
    model.dynplan.budget = dynplan.StreamBudget(0.8, burst=3)
    model.save_pretrained(tmp_path)
    inputs = inputs_of()
    wanted = model(**inputs).logits
    for other in (dynplan.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.dynplan.planner is not model.dynplan.planner
        other.dynplan.budget.reset()
        assert torch.equal(other(**inputs).logits, wanted)
        assert repr(other.dynplan.budget) == "StreamBudget(0.8, burst=3)"


@torch.no_grad()
def test_compiled():
    original, model = swapped()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = inputs_of()
    plan = assert_right(original, model, inputs)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert torch.equal(model.dynplan.last_plan, plan)
    with pytest.raises(NotImplementedError, match="a policy that a program can hold"):
        torch.export.export(model, (), dict(inputs), strict=False)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: exits_of(depths=(0, 2)), ValueError, r"expected depths to rise within 1\.\.3, got \[0, 2\]"),
        (lambda: exits_of(depths=(2, 4)), ValueError, r"expected depths to rise within 1\.\.3, got \[2, 4\]"),
        (lambda: exits_of(depths=(2, 2)), ValueError, "expected depths to rise"),
        (lambda: exits_of(depths=(1.5,)), ValueError, "expected depths to be integers, got 1.5"),
        (lambda: ConfidenceExit(nn.Linear(2, 2)), TypeError, "expected planner to be dynplan.nn.Exits"),
        (lambda: policy_of(chains=((3, 1),)), ValueError, "expected chains to rise within the depths"),
        (lambda: policy_of(chains=((5,),)), ValueError, "expected chains to rise within the depths"),
        (lambda: policy_of(budget=1.5), ValueError, "expected budget to be within 0..1, got 1.5"),
        (lambda: ConfidenceExit(exits_of(), 1.0, [[1, 4]], [1], [[0.5]]), ValueError, "expected choice"),
        (lambda: ConfidenceExit(exits_of(), 1.0, [[1, 4]], [0], [[]]), ValueError, "expected thresholds for"),
    ],
)
def test_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@torch.no_grad()
def test_models_that_do_not_fit():
    for task, name in (("Model", "BertModel"), ("ForTokenClassification", "BertForTokenClassification")):
        model = dynplan.swap(tiny("bert", task), policy_of())
        with pytest.raises(NotImplementedError, match=f"whose head reads the first position.*{name}"):
            model(**inputs_of())
    model = dynplan.swap(tiny(num_hidden_layers=6), policy_of())
    with pytest.raises(ValueError, match="expected a model of 4 layers, as the exits are for, got 6"):
        model(**inputs_of())


@pytest.mark.parametrize("kind", [HashExit, RandomExit])
@torch.no_grad()
def test_exits_that_no_answer_decides_about(kind):
    """Half of the samples go on, in the contract; in batches and alone, where native code runs them."""
    policy = policy_of(kind, chains=((1, 3),), threshold=0.5)
    original, model = swapped(policy=policy)
    texts = batch([4] * 60, seed=2)
    model.dynplan.budget = 0.5
    plan = assert_right(original, model, texts)
    assert sorted(plan.sum(1).tolist()) == [1] * 30 + [3] * 30, "as many go on as the contract pays for"
    again = assert_right(original, model, texts)
    assert torch.equal(plan, again) == (kind is HashExit), "a text has one path, chance has many"
    model.dynplan.budget = dynplan.StreamBudget(1.0)
    alone = []
    for row in range(60):
        one = {name: values[row : row + 1] for name, values in texts.items()}
        alone.append(assert_right(original, model, one))
    depths = torch.cat(alone).sum(1)
    assert set(depths.tolist()) == {1, 3} and 15 < (depths == 3).sum() < 45
    if kind is HashExit:
        one, other = sorted((depths == 3, plan.sum(1) == 3), key=lambda gone: int(gone.sum()))
        assert not (one & ~other).any(), "the same ones first, in batches and alone"
    model.dynplan.budget = dynplan.StreamBudget(0.5, burst=0)
    kept = sum(
        int(assert_right(original, model, {name: v[row : row + 1] for name, v in texts.items()}).sum())
        for row in range(60)
    )
    assert 60 <= kept <= 0.5 * LAYERS * 60


@torch.no_grad()
def test_chance_is_seeded():
    plans = []
    for seed in (0, 0, 1):
        policy = RandomExit(exits_of(), 0.5, [[1, 3]], [0] * 5, [[0.5] * 5], seed=seed)
        model = swapped(policy=policy)[1]
        plans.append([model(**batch([4] * 20)) and model.dynplan.last_plan for _ in range(2)])
    assert all(map(torch.equal, plans[0], plans[1])) and not all(map(torch.equal, plans[0], plans[2]))
    assert policy.options()["seed"] == 1
