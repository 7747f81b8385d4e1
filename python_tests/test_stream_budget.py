"""The stream's contract, whatever comes in whatever order."""

import copy
import pickle
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynplan import StreamBudget

LAYERS = 12


def offsets(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def assert_kept(budget, layers=LAYERS):
    state = budget.state
    room = budget.burst * layers
    assert state["sample_layers"] <= budget.share * layers * state["samples"] + room + 1e-5
    assert state["token_layers"] <= budget.share * layers * state["tokens"] + room * state["longest"] + 1e-5


def spend(budget, lengths, priority, steps, wanted=None):
    """What a policy does with a batch: count it in, then ask for some layers more, twice."""
    lengths = torch.tensor(lengths)
    budget.arrive(offsets(lengths.tolist()))
    wanted = lengths > 0 if wanted is None else wanted
    taken = budget.take(priority, wanted, offsets(lengths.tolist()), steps, LAYERS)
    assert not (taken & ~wanted).any()
    return taken


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_never_broken(data):
    budget = StreamBudget(data.draw(st.floats(0, 1)), data.draw(st.floats(0, 40)))
    for _ in range(data.draw(st.integers(1, 12))):
        lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
        priority = torch.rand(len(lengths))
        spend(budget, lengths, priority, data.draw(st.integers(0, LAYERS)))
        assert_kept(budget)


def test_a_million_samples():
    """Everybody wants everything: what is run comes to the share, and never to more than the contract."""
    budget, draw = StreamBudget(0.37, burst=16), random.Random(0)
    seen = 0
    while seen < 1_000_000:
        count = draw.choice((1, 7, 512, 4096))
        lengths = torch.randint(0, 70, (count,)).tolist()
        steps = draw.randint(1, LAYERS)
        spend(budget, lengths, torch.rand(count), steps)
        assert_kept(budget)
        seen += count
    state = budget.state
    assert state["samples"] <= seen
    assert state["sample_layers"] >= 0.2 * LAYERS * state["samples"], "and most of it is used"


def test_surest_last():
    budget = StreamBudget(0.5, burst=0)
    taken = spend(budget, [5, 5, 5, 5], torch.tensor([0.1, 0.4, 0.3, 0.2]), LAYERS)
    assert taken.tolist() == [False, True, True, False]


def test_saved_work_is_there_later():
    budget = StreamBudget(0.5, burst=0)
    one = torch.zeros(1)
    assert not spend(budget, [5], one, 12), "half of twelve layers"
    assert spend(budget, [5], one, 12), "two samples' halves"
    assert not spend(budget, [5], one, 1) or budget.state["sample_layers"] <= 18


def test_level():
    budget = StreamBudget(0.5, burst=4)
    assert budget.level(LAYERS) == pytest.approx(1)
    spend(budget, [5, 5], torch.zeros(2), LAYERS)
    assert budget.level(LAYERS) == pytest.approx(1 - 12 / 48)
    assert StreamBudget(0.5, burst=0).level(LAYERS) == 0


def test_threads_share_it():
    budget = StreamBudget(0.3, burst=3)

    def work():
        for _ in range(300):
            spend(budget, [4], torch.zeros(1), LAYERS)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_kept(budget)
    assert budget.state["samples"] == 1200
    assert budget.state["sample_layers"] >= 0.29 * LAYERS * 1200


def test_state():
    budget = StreamBudget(0.5, burst=2)
    spend(budget, [3, 9], torch.zeros(2), 4)
    assert budget.state == {
        "samples": 2, "tokens": 12, "sample_layers": 8, "token_layers": 48, "longest": 9
    }  # fmt: skip
    for other in (copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert other.state == budget.state and repr(other) == repr(budget)
    kept = budget.state
    budget.reset()
    assert set(budget.state.values()) == {0}
    budget.state = kept
    assert budget.state == kept


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1.5,), ValueError, "expected share to be within 0..1, got 1.5"),
        (("half",), TypeError, "expected share to be a number, got str"),
        ((0.5, -1), ValueError, "expected burst to be at least 0, got -1"),
        ((0.5, None), TypeError, "expected burst to be a number, got NoneType"),
        ((0.5, float("nan")), ValueError, "expected burst to be at least 0, got nan"),
    ],
)
def test_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        StreamBudget(*arguments)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"samples": 1},
        None,
        dict.fromkeys(("samples", "tokens", "sample_layers", "token_layers", "longest"), -1),
    ],
)
def test_states_are_checked(state):
    with pytest.raises(ValueError, match="expected state to map samples"):
        StreamBudget(0.5).state = state
