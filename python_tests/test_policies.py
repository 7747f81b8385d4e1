"""Policies: the plans they make, and the budget as a contract whatever the scores."""

import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dynplan.budget import admit, check_budget, choose_paths, whole_layers, within_budget
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.policies import (
    FixedPath,
    HashPath,
    KeepAll,
    PlannerPolicy,
    PlanRequest,
    Policy,
    RandomPath,
    StaticPath,
    policy_from_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 5
budgets = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.2, 0.29, 0.5, 1 / 3]))
lengths = st.lists(st.integers(0, 9), min_size=0, max_size=6)
scores = st.one_of(st.floats(width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))


def request_of(lengths, width=6, seed=0, budget=None, num_layers=LAYERS):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(int(offsets[-1]), width, generator=generator)
    longest = max(lengths, default=0)
    mask = torch.arange(longest) < torch.tensor(lengths, dtype=torch.long).unsqueeze(1)
    ids = torch.randint(2, 99, mask.shape, generator=generator).where(mask, torch.tensor(0))
    return PlanRequest(len(lengths), num_layers, hidden, offsets, budget, ids, mask)


def assert_within(plan, request, budget):
    """The contract, in exact integers but for the rounding of the product."""
    lengths = request.cu_seqlens.diff().long()
    if budget < 1:  # samples without tokens do not count
        assert plan.sum().item() <= budget * (lengths > 0).sum().item() * plan.shape[1] + 1e-5
        assert not plan[lengths == 0].any()
    assert plan.dtype == torch.bool and plan.shape == (request.batch_size, request.num_layers)
    assert plan.sum().item() <= budget * plan.numel() + 1e-5
    assert (plan * lengths.unsqueeze(1)).sum().item() <= budget * lengths.sum().item() * plan.shape[1] + 1e-5


def table(draw_from, rows):
    return st.lists(st.lists(draw_from, min_size=rows, max_size=rows), min_size=6, max_size=6)


@given(table(scores, LAYERS), lengths, budgets)
def test_within_budget_whatever_the_scores(values, lengths, budget):
    request = request_of(lengths)
    plan = within_budget(torch.tensor(values)[: len(lengths)], request.cu_seqlens, budget)
    assert_within(plan, request, budget)
    if budget == 1:
        assert plan.all()


@given(table(st.floats(-9, 9, width=32), LAYERS), st.lists(st.just(4), min_size=1, max_size=6), budgets)
def test_within_budget_takes_the_best_and_all_that_fit(values, lengths, budget):
    request = request_of(lengths)
    given_scores = torch.tensor(values)[: len(lengths)]
    plan = within_budget(given_scores, request.cu_seqlens, budget)
    assert plan.sum() == whole_layers(budget, plan.numel())
    if plan.any() and not plan.all():
        assert given_scores[plan].min() >= given_scores[~plan].max()


@given(table(scores, LAYERS), lengths, budgets, budgets)
def test_a_smaller_budget_keeps_a_subset(values, lengths, one, other):
    request = request_of(lengths)
    given_scores = torch.tensor(values)[: len(lengths)]
    small, large = (
        within_budget(given_scores, request.cu_seqlens, budget) for budget in sorted((one, other))
    )
    assert not (small & ~large).any()


def test_samples_without_tokens_do_not_use_up_the_budget():
    request = request_of([0, 3])
    given_scores = torch.tensor([[9.0] * LAYERS, [1.0] * LAYERS])
    plan = within_budget(given_scores, request.cu_seqlens, 0.5)
    assert plan.sum(1).tolist() == [0, 2]  # 2 layers of 3 tokens are within 7.5 token-layers


@given(
    table(scores, 7),
    st.lists(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), min_size=6, max_size=6),
    lengths,
    budgets,
    st.one_of(st.none(), st.floats(0, 100)),
)
def test_choose_paths_keeps_the_contract_whatever_the_values(values, rows, lengths, budget, price):
    request = request_of(lengths)
    paths = torch.tensor([*rows, [False] * LAYERS])
    plan = choose_paths(torch.tensor(values)[: len(lengths)], paths, request.cu_seqlens, budget, price)
    assert_within(plan, request, budget)
    known = {tuple(path) for path in paths.tolist()}
    assert all(tuple(row) in known for row in plan.tolist())


def test_choose_paths_saves_only_for_those_who_buy():
    paths = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    offsets = torch.tensor([0, 3, 6, 9]).int()
    alike = torch.tensor([[0.0, 0.5, 0.6, 0.7]]).repeat(3, 1)
    # At this price everybody would rather have one layer than two, but nobody wants more.
    assert choose_paths(alike, paths, offsets, 0.5, 0.2).sum(1).tolist() == [2, 2, 2]
    one_buys = alike.clone()
    one_buys[1, 3], one_buys[2, 1] = 5.0, 0.55
    # Two layers more are needed: both others save one, none is left over.
    assert choose_paths(one_buys, paths, offsets, 0.5, 0.2).sum(1).tolist() == [1, 4, 1]


def test_choose_paths_trades_between_samples():
    paths = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    # The first sample gains nothing from its last layers; the second needs them all.
    values = torch.tensor([[0.9, 0.9, 0.9], [0.0, 0.1, 1.0]])
    offsets = torch.tensor([0, 3, 6]).int()
    assert choose_paths(values, paths, offsets, 0.5, None).sum(1).tolist() == [0, 2]
    assert choose_paths(values, paths, offsets, 0.5, 0.1).sum(1).tolist() == [0, 4]
    # A longer second sample cannot be paid for with what the short first one saves.
    offsets = torch.tensor([0, 1, 9]).int()
    assert choose_paths(values, paths, offsets, 0.5, 0.1).sum(1).tolist() == [0, 2]


def test_samples_without_tokens_do_not_trade():
    paths = torch.tensor([[0, 0], [1, 1]], dtype=torch.bool)
    plan = choose_paths(torch.tensor([[0.0, 1.0]]), paths, torch.tensor([0, 0]).int(), 0.5, 0.0)
    assert not plan.any()


def test_admit_stops_at_either_cap():
    priority = torch.tensor([1.0, 3.0, math.nan, 2.0])
    ones, tokens = torch.ones(4, dtype=torch.long), torch.tensor([1, 5, 1, 5])
    assert admit(priority, ones, tokens, 2, 99).tolist() == [False, True, False, True]
    assert admit(priority, ones, tokens, 99, 6).tolist() == [False, True, False, False]
    assert admit(priority, ones, tokens, 99, 99).all()


class Scripted(nn.Module):
    """A planner that says what it is told."""

    def __init__(self, answers, threshold=-math.inf, stepwise=True):
        super().__init__()
        self.answers, self.limit, self.stepwise = answers, threshold, stepwise

    def forward(self, *args):
        return self.answers[:, args[0]] if self.stepwise else self.answers

    def threshold(self, budget):
        return self.limit


@given(table(scores, LAYERS), lengths, budgets, scores)
def test_stepwise_keeps_the_contract_whatever_the_scores(values, lengths, budget, threshold):
    request = request_of(lengths, budget=budget)
    policy = PlannerPolicy(Scripted(torch.tensor(values)[: len(lengths)], threshold))
    plan = torch.zeros(len(lengths), LAYERS, dtype=torch.bool)
    for layer in range(LAYERS):
        plan[:, layer] = policy.keep(layer, request, request.hidden, plan)
    assert_within(plan, request, budget)
    if budget == 1:
        assert plan.all()


def test_stepwise_keeps_only_what_reaches_the_threshold():
    answers = torch.tensor([[0.9, 0.1, 0.8, 0.1, 0.1], [0.2, 0.9, 0.9, 0.9, 0.2]])
    request = request_of([4, 4], budget=0.4)
    policy = PlannerPolicy(Scripted(answers, threshold=0.5))
    plan = torch.zeros(2, LAYERS, dtype=torch.bool)
    for layer in range(LAYERS):
        plan[:, layer] = policy.keep(layer, request, request.hidden, plan)
    # Four of ten sample-layers: the last wanted layer of the second sample finds the budget spent.
    assert plan.tolist() == [
        [True, False, True, False, False],
        [False, True, True, False, False],
    ]


MAKERS = {
    "random": lambda: RandomPath(seed=1),
    "hash": lambda: HashPath(),
    "static": lambda: StaticPath({1: [0], 2: [1, 3], 4: [0, 1, 2, 4]}),
    "upfront": lambda: PlannerPolicy(UpfrontPlanner(6, LAYERS)),
    "paths": lambda: PlannerPolicy(UpfrontPlanner(6, LAYERS, paths=[(0,), (1, 2), (0, 2, 3, 4)])),
}


@pytest.mark.parametrize("name", MAKERS)
@given(lengths, budgets)
def test_every_policy_with_a_budget_keeps_the_contract(name, lengths, budget):
    request = request_of(lengths, budget=budget)
    with torch.no_grad():
        assert_within(MAKERS[name]().plan(request), request, budget)


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_the_request_overrides_the_policys_budget(name):
    policy = MAKERS[name]()
    assert policy.takes_budget
    policy.budget = 0.2
    assert policy.plan(request_of([4] * 6)).sum() <= 6
    assert policy.plan(request_of([4] * 6, budget=0.8)).sum() > 6


def test_keep_all():
    assert KeepAll().plan(request_of([2, 0])).all() and not KeepAll.takes_budget


def test_fixed_path():
    row = [True, False, True, False, True]
    assert FixedPath(row).plan(request_of([2, 1])).tolist() == [row, row]
    with pytest.raises(TypeError, match="FixedPath: expected keep to be bool, got torch.int64"):
        FixedPath([1, 0, 1])
    with pytest.raises(ValueError, match=r"FixedPath: expected keep of shape \(L,\) or \(B, L\), got \(\)"):
        FixedPath(True)
    keep = torch.tensor(row)
    policy = FixedPath(keep)
    keep[:] = False
    assert policy.plan(request_of([1])).tolist() == [row]


def test_random_path_is_even_seeded_and_different_each_time():
    request = request_of([5] * 8)
    policy = RandomPath(0.5, seed=7)
    first, second = policy.plan(request), policy.plan(request)
    assert set(first.sum(1).tolist()) == {2, 3} and first.sum() == 20
    assert not torch.equal(first, second)
    again = RandomPath(0.5, seed=7)
    assert torch.equal(again.plan(request), first) and torch.equal(again.plan(request), second)
    assert torch.equal(copy.deepcopy(again).plan(request), first)
    assert pickle.loads(pickle.dumps(policy)).to_config() == policy.to_config()
    share = torch.stack([policy.plan(request) for _ in range(200)]).float().mean((0, 1))
    assert (share - 0.5).abs().max() < 0.08


def test_hash_path_depends_on_the_tokens_alone():
    policy = HashPath(0.6)
    request = request_of([4, 7, 4])
    request.input_ids[2] = request.input_ids[0]
    plan = policy.plan(request)
    assert plan.sum(1).tolist() == [3, 3, 3] and torch.equal(plan[0], plan[2])
    flipped = request_of([4, 7, 4])
    flipped.input_ids, flipped.attention_mask = (
        torch.nn.functional.pad(value, (3, 2)) for value in (request.input_ids, request.attention_mask)
    )
    assert torch.equal(policy.plan(flipped), plan)
    plans = policy.plan(request_of([6] * 200, seed=5)).float()
    assert (plans.mean(0) - 0.6).abs().max() < 0.15 and len(plans.unique(dim=0)) == 10
    swapped = request_of([4, 7, 4])
    swapped.input_ids = request.input_ids.flip(1)
    assert not torch.equal(HashPath(0.6).plan(swapped)[1:2], plan[1:2])
    assert not torch.equal(HashPath(0.6, seed=1).plan(request), plan)
    request.input_ids = None
    with pytest.raises(ValueError, match="HashPath: expected input_ids, got inputs_embeds"):
        policy.plan(request)


def test_samples_without_tokens_keep_nothing():
    """Of three samples one has tokens: half of its four layers is all there is to spend."""
    paths = PlannerPolicy(UpfrontPlanner(6, 4, paths=[(0,), (1, 2)]))
    stepwise = Scripted(torch.ones(1, 4))
    for lengths, kept in (([2, 0, 0], 2), ([0], 0), ([2], 2)):
        request = request_of(lengths, budget=0.5, num_layers=4)
        upfront = PlannerPolicy(UpfrontPlanner(6, 4))
        with torch.no_grad():
            for policy in (HashPath(), StaticPath({2: [0, 3]}), RandomPath(), upfront):
                plan = policy.plan(request)
                assert plan[0].sum() == plan.sum() == kept, policy
            assert paths.plan(request).sum() <= kept
    request = request_of([0], budget=0.5, num_layers=4)
    assert (
        not PlannerPolicy(stepwise)
        .keep(0, request, request.hidden, torch.zeros(1, 4, dtype=torch.bool))
        .any()
    )


def test_static_path_takes_the_largest_that_fits():
    policy = StaticPath({4: [4, 0, 1, 2], 2: [1, 3]})
    request = request_of([3, 1])
    expected = {1.0: 5, 0.99: 4, 0.8: 4, 0.79: 2, 0.4: 2, 0.39: 0, 0.0: 0}
    for budget, size in expected.items():
        request.budget = budget
        plan = policy.plan(request)
        assert plan.sum(1).tolist() == [size, size]
    request.budget = 0.4
    assert policy.plan(request)[0].tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match=r"expected 2 different layers for size 2, got \(1, 1\)"):
        StaticPath({2: [1, 1]})
    request.budget = 0.5
    with pytest.raises(ValueError, match="StaticPath: expected layers 0..4 for this model, got 9"):
        StaticPath({1: [9]}).plan(request)


@pytest.mark.parametrize(
    "policy",
    [
        KeepAll(),
        FixedPath([True, False]),
        RandomPath(0.25, 9),
        HashPath(0.25, 9),
        StaticPath({2: [0, 3]}, 0.5),
        PlannerPolicy(UpfrontPlanner(4, 3, width=2, paths=[(0, 2)], prices=[0.5, 0.1]), 0.5),
        PlannerPolicy(StepwisePlanner(4, 3, width=2, thresholds=[-1, 0, 2.5]), 0.5),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_configs_survive_json(policy):
    text = json.dumps(policy.to_config())
    again = policy_from_config(json.loads(text))
    assert type(again) is type(policy) and json.dumps(again.to_config()) == text
    assert type(policy).__name__ in repr(policy)


def test_your_own_policy_is_found_by_its_name():
    class EveryOther(Policy):
        def __init__(self, start=0):
            self.start = start

        def plan(self, request):
            keep = torch.zeros(request.batch_size, request.num_layers, dtype=torch.bool)
            keep[:, self.start :: 2] = True
            return keep

        def options(self):
            return {"start": self.start}

    assert policy_from_config(EveryOther(1).to_config()).start == 1
    with pytest.raises(NotImplementedError, match="Bare: expected plan"):
        type("Bare", (Policy,), {})().plan(request_of([1]))
    with pytest.raises(NotImplementedError, match="Bare: expected keep"):
        type("Bare", (Policy,), {})().keep(0, request_of([1]), torch.zeros(1, 1), torch.zeros(1, 1))


def test_bad_configs_and_budgets_are_refused():
    with pytest.raises(ValueError, match="expected type to be a policy's, got None"):
        policy_from_config({})
    with pytest.raises(ValueError, match="expected the arguments of FixedPath, got"):
        policy_from_config({"type": "FixedPath"})
    with pytest.raises(ValueError, match="expected type to be one of .*, got 'Oracle'"):
        policy_from_config({"type": "PlannerPolicy", "planner": {"type": "Oracle"}})
    with pytest.raises(TypeError, match="expected planner to be a planner module, got Linear"):
        PlannerPolicy(nn.Linear(1, 1))
    for make in (RandomPath, HashPath, lambda budget: StaticPath({}, budget)):
        for budget, error in (
            (-0.1, ValueError),
            (1.1, ValueError),
            (math.nan, ValueError),
            ("1", TypeError),
        ):
            with pytest.raises(error, match="expected budget to be"):
                make(budget)
    assert check_budget("test", 1) == 1.0
