"""Planners: what they read, where they start, what they store."""

import math

import pytest
import torch
from torch import nn

from dynplan.budget import within_budget
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.nn.planner import _pool_without_host, planner_from_config, pool

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (4, 0, 1, 6)
OFFSETS = torch.tensor([0, 4, 4, 5, 11]).int()


def hidden(seed=0, **options):
    return torch.randn(11, 8, generator=torch.Generator().manual_seed(seed)).to(**options)


def randomised(planner):
    torch.manual_seed(1)
    for parameter in planner.parameters():
        nn.init.normal_(parameter)
    return planner


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (), (0,)])
@pytest.mark.parametrize("pool", [pool, _pool_without_host], ids=["cpu", "cuda"])
def test_pooling(pool, lengths, kind):
    rows = torch.randn(sum(lengths) + 2, 8, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    pooled = pool(rows, offsets, kind)
    assert pooled.shape == (len(lengths), 8)
    for found, part in zip(pooled, rows.split([*lengths, 2]), strict=False):
        expected = getattr(part, "mean" if kind == "mean" else "amax")(0) if len(part) else torch.zeros(8)
        torch.testing.assert_close(found, expected.double())
    if any(lengths):
        pooled.sum().backward()
        assert (rows.grad[: sum(lengths)].sum() - 8 * sum(n > 0 for n in lengths)).abs() < 1e-9


@pytest.mark.parametrize("paths", [None, [(0,), (0, 2)]])
def test_upfront_gradients_reach_planner_and_embeddings(paths):
    planner = randomised(UpfrontPlanner(8, 3, width=4, paths=paths))
    rows = hidden().requires_grad_()
    planner(rows, OFFSETS, 0.5).pow(2).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in planner.parameters())
    assert (rows.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("make", [UpfrontPlanner, StepwisePlanner])
def test_a_sample_is_scored_alone(make):
    planner = randomised(make(8, 3))
    step = (0,) if planner.stepwise else ()
    with torch.no_grad():
        together = planner(*step, hidden(), OFFSETS, 0.5)
        for index, part in enumerate(hidden().split(LENGTHS)):
            if planner.stepwise and not len(part):
                continue  # has no first row, and no work to decide on
            alone = planner(*step, part, torch.tensor([0, len(part)]).int(), 0.5)
            torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)
        assert planner(*step, hidden()[:0], OFFSETS[:1], 0.5).shape[0] == 0


@pytest.mark.parametrize("make", [UpfrontPlanner, StepwisePlanner])
def test_rows_beyond_the_last_offset_are_not_read(make):
    planner = randomised(make(8, 3))
    step = (0,) if planner.stepwise else ()
    padded = torch.cat((hidden(), torch.full((3, 8), math.nan)))
    with torch.no_grad():
        expected = planner(*step, hidden(), OFFSETS, 0.5)
        assert torch.equal(planner(*step, padded, OFFSETS, 0.5), expected)
        assert planner(*step, hidden(dtype=torch.bfloat16), OFFSETS, 0.5).dtype == torch.float32


@torch.no_grad()
def test_a_fresh_planner_starts_on_the_best_fixed_paths():
    static = {1: (2,), 2: (0, 3), 4: (0, 1, 2, 3)}
    planner = UpfrontPlanner(8, 4).start_from(static)
    assert planner.start_from(static) is planner
    for budget, layers in ((0.25, (2,)), (0.5, (0, 3)), (1.0, (0, 1, 2, 3))):
        plan = within_budget(planner(hidden(), OFFSETS, budget), OFFSETS, budget)
        for index, length in enumerate(LENGTHS):
            if length:
                assert tuple(plan[index].nonzero().flatten().tolist()) == layers
    # Between sizes: the smaller path first, then what the larger adds.
    scores = planner(hidden(), OFFSETS, 0.75)[0]
    assert scores[[0, 3]].min() > scores[[1, 2]].max() > 0
    with pytest.raises(ValueError, match="expected a planner in layer mode, got one with paths"):
        UpfrontPlanner(8, 4, paths=[(0,)]).start_from(static)


def test_the_empty_path_is_always_there():
    assert UpfrontPlanner(8, 3, paths=[(0, 1)]).paths.tolist() == [[False] * 3, [True, True, False]]
    table = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(UpfrontPlanner(8, 3, paths=table).paths, table)


@torch.no_grad()
def test_calibrated_prices_spend_the_budget_on_average():
    planner = UpfrontPlanner(8, 4, paths=[range(size) for size in range(1, 5)])
    generator = torch.Generator().manual_seed(2)
    qualities = torch.rand(500, 5, generator=generator).sort(1).values
    assert planner.price(0.5) is None
    planner.calibrate(qualities)
    sizes = planner.paths.sum(1)
    for budget in (0.25, 0.5, 0.75):
        chosen = (qualities - planner.price(budget) * sizes).argmax(1)
        assert abs(sizes[chosen].float().mean().item() / 4 - budget) < 0.02
    assert planner.price(0.2) >= planner.price(0.6) >= planner.price(1.0) >= 0
    with pytest.raises(ValueError, match="expected a planner with paths, got one in layer mode"):
        UpfrontPlanner(8, 4).calibrate(qualities)


def test_calibrated_thresholds_are_quantiles():
    planner = StepwisePlanner(8, 3)
    assert planner.threshold(0.5) == -math.inf
    scores = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    planner.calibrate(scores.view(40, 100))
    for budget in (0.1, 0.5, 0.9):
        assert abs((scores >= planner.threshold(budget)).float().mean().item() - budget) < 0.01
    assert planner.threshold(1.0) == -math.inf
    assert StepwisePlanner(8, 3).calibrate(torch.tensor([2.0])).threshold(0.3) == 2.0
    for wrong in (torch.tensor([]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="StepwisePlanner.calibrate: expected finite scores"):
            planner.calibrate(wrong)


@pytest.mark.parametrize("make", [UpfrontPlanner, StepwisePlanner])
def test_wrong_sizes_are_refused(make):
    for sizes, name in (((0, 3), "hidden_size"), ((8, 0), "num_layers"), ((8, 3, 1.5), "width")):
        with pytest.raises(ValueError, match=f"expected {name} to be a positive integer"):
            make(*sizes)


def test_wrong_paths_are_refused():
    with pytest.raises(ValueError, match=r"expected paths to be bool of shape \(P, 3\), got .* \(2, 4\)"):
        UpfrontPlanner(8, 3, paths=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected paths of layers 0..2, got 3"):
        UpfrontPlanner(8, 3, paths=[(0, 3)])


def test_unknown_configs_are_refused():
    with pytest.raises(ValueError, match="expected the arguments of StepwisePlanner, got"):
        planner_from_config({"type": "StepwisePlanner", "depth": 3})
    for config, words in (
        ([], "expected a mapping, got list"),
        ({"type": []}, "expected type to be one of"),
        ({"hidden_size": True}, "expected hidden_size to be a positive integer, got True"),
        ({"hidden_size": 2**20, "width": 2**20}, "expected at most 134217728 parameters"),
        ({"num_layers": 2**40}, "expected num_layers to be at most 4096"),
        ({"prices": []}, r"expected prices to be finite numbers, got \[\]"),
        ({"prices": [0.0, math.nan]}, "expected prices to be finite numbers"),
        ({"paths": [[True]]}, "expected paths of layers 0..2, got True"),
        ({"paths": [["0"]]}, "expected paths of layers 0..2, got 0"),
    ):
        if isinstance(config, dict):
            config = {"type": "UpfrontPlanner", "hidden_size": 8, "num_layers": 3, **config}
        with pytest.raises(ValueError, match=words):
            planner_from_config(config)


def test_calibration_needs_finite_qualities():
    for wrong in (torch.zeros(0, 2), torch.tensor([[0.0, math.nan]])):
        with pytest.raises(ValueError, match="UpfrontPlanner.calibrate: expected finite qualities"):
            UpfrontPlanner(8, 3, paths=[(0,)]).calibrate(wrong)
