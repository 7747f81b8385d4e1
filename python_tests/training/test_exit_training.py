"""Exits from training to a saved model: what is trained, what is chosen, and that both can be had again."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import dynplan
from dynplan.loading import load_tokenizer
from dynplan.nn import Exits
from dynplan.policies import (
    ConfidenceExit,
    EntropyExit,
    HashExit,
    LearnedExit,
    PatienceExit,
    RandomExit,
)
from dynplan.training import (
    InputError,
    Recipe,
    encode_rows,
    evaluate,
    finetune,
    infer_task,
    load_run,
    plain_model,
    read_rivals,
)
from dynplan.training.calibration import GRID, calibrate
from dynplan.training.exits import ExitAnswers, default_depths, exit_answers, masked_mean
from dynplan.training.predict import make_batches
from dynplan.training.rivals import mixture, oracle, rivals

QUICK = Recipe(exit_epochs=2, max_length=16, learning_rate=3e-3, holdout=0.3)
CLASSES = infer_task([{"label": 0}, {"label": 1}])
NUMBERS = infer_task([{"label": 0.5}])


@pytest.fixture(scope="module")
def tuned(tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exits")
    finetune(
        tiny_model,
        rows,
        folder,
        recipe=replace(QUICK, plain_epochs=10, exit_epochs=6, batch_size=8),
        progress=False,
    )
    return folder


def answers_of(rows=400, exits=3, classes=2, seed=0):
    """Answers that get better, and surer, with depth; some rows are harder than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    hard = torch.rand(rows, 1, generator=generator)
    depth = torch.arange(1, exits + 2) / (exits + 1)
    strength = 4 * depth * (1.2 - hard)
    noise = torch.randn(rows, exits + 1, classes, generator=generator)
    right = torch.nn.functional.one_hot(labels, classes).unsqueeze(1)
    return ExitAnswers(
        strength.unsqueeze(2) * right + noise, torch.zeros(rows, exits, 8), labels, torch.full((rows,), 5)
    )


def test_where_exits_are():
    assert default_depths(12) == (2, 3, 4, 6, 8, 10)
    assert default_depths(6) == (1, 2, 3, 4, 5)
    assert default_depths(2) == (1,) and default_depths(1) == ()


def test_a_run_leaves_a_planner_with_exits(tuned, rows):
    model = dynplan.from_pretrained(tuned)
    policy = model.dynplan.policy
    assert type(policy) is ConfidenceExit and len(policy.choice) == GRID + 1
    task, recipe, static = load_run(tuned)
    assert recipe["planner"] == "exits" and static == {}
    found = read_rivals(tuned, policy.planner)
    kinds = {ConfidenceExit, EntropyExit, HashExit, LearnedExit, PatienceExit, RandomExit}
    assert {type(one) for one in found.values()} == kinds
    assert all(len(chain) == 1 for chain in found["fixed depth"].chains)
    tokenizer = load_tokenizer(tuned)
    dataset = encode_rows(rows, task, tokenizer, 16)
    table = evaluate(
        model, plain_model(tuned), static, dataset, task, tokenizer, (1.0, 0.5), seconds=0.05,
        progress=False, rivals=found,
    )  # fmt: skip
    by_name = {(row.name, row.budget): row for row in table}
    assert by_name["planner", 1.0].sample_layers <= 1
    for name in ("planner", *found):
        row = by_name[name, 0.5]
        assert row.sample_layers <= 0.5 and row.stream_score is not None
        assert all(row.latency_ms[size] > 0 for size in ("1", "32"))
    assert by_name["Hugging Face (sdpa)", None].figures["score"] > 0.8, "the task is easy"
    assert by_name["planner", 1.0].figures["score"] >= by_name["planner", 0.5].figures["score"] - 0.1


def test_masked_mean_is_pooling(tuned, rows):
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    mean = masked_mean(states, mask)
    for row, keep, got in zip(states, mask.bool(), mean, strict=True):
        torch.testing.assert_close(got, row[keep].mean(0))
    assert not masked_mean(states, torch.zeros(3, 5)).any()


def test_answers_are_those_of_the_model(tuned, rows):
    """What calibration saw is what the model says when it stops there."""
    model = dynplan.from_pretrained(tuned)
    task, tokenizer = load_run(tuned)[0], load_tokenizer(tuned)
    batches = make_batches(encode_rows(rows[:20], task, tokenizer, 16), tokenizer, 8)
    exits = model.dynplan.planner
    answers = exit_answers(model, exits, batches, task)
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    for index, depth in enumerate((*exits.depths, exits.num_layers)):
        model.dynplan.policy = ConfidenceExit(exits, 1.0, [[depth]], [0], [[0.0]])
        model.dynplan.budget = depth / exits.num_layers
        with torch.no_grad():
            logits = torch.cat([model(**batch).logits for batch in inputs])
        torch.testing.assert_close(logits, answers.logits[:, index], rtol=1e-4, atol=1e-4)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_one_that_was_not(tiny_model, rows, tmp_path):
    whole = finetune(tiny_model, rows[:60], tmp_path / "whole", recipe=QUICK, progress=False)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            tiny_model, rows[:60], tmp_path / "cut", recipe=QUICK, progress=False, callbacks=[Interrupt(4)]
        )
    resumed = finetune(tiny_model, rows[:60], tmp_path / "cut", recipe=QUICK, resume=True, progress=False)
    again = finetune(tiny_model, rows[:60], tmp_path / "cut", recipe=QUICK, resume=True, progress=False)
    for other in (resumed, again):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
        assert other.dynplan.policy.options() == whole.dynplan.policy.options()


def test_regression(tiny_model, rows, tmp_path):
    numbers = [{**row, "label": row["label"] + 0.5} for row in rows]
    model = finetune(tiny_model, numbers, tmp_path, recipe=QUICK, progress=False)
    assert model.dynplan.planner.errors is not None
    names = {"fixed depth", "patience exit", "hash exit", "random exit"}
    assert set(read_rivals(tmp_path, model.dynplan.planner)) == names


def simulate(policy, answers, budget, task=CLASSES):
    """Mean depth and quality when each row alone leaves by its threshold."""
    place = round(budget * GRID)
    chain = policy.chains[policy.choice[place]]
    threshold = policy.thresholds[policy.choice[place]][place]
    every = (*policy.planner.depths, policy.planner.num_layers)
    qualities = answers.qualities(task)
    depths, scores = [], []
    for row in range(len(answers.labels)):
        for depth in chain:
            index = every.index(depth)
            sure = answers.logits[row, index] / policy.planner.temperatures[index]
            if depth == chain[-1] or sure.softmax(0).max() >= threshold:
                depths.append(depth)
                scores.append(float(qualities[row, index]))
                break
    return sum(depths) / len(depths), sum(scores) / len(scores)


@pytest.mark.parametrize("classes", [2, 4])
def test_tables_keep_budgets_and_use_them(classes):
    exits, answers = Exits(8, 4, (1, 2, 3)), answers_of(classes=classes)
    policy = calibrate(exits, answers, CLASSES)
    fixed = calibrate(exits, answers, CLASSES, longest=1)
    last = -1.0
    for budget in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0):
        depth, score = simulate(policy, answers, budget)
        assert depth <= budget * 4 + 1e-4
        assert score >= last - 0.01, "no worse with more to spend"
        assert score >= simulate(fixed, answers, budget)[1] - 0.01, "fixed depths are among the choices"
        last = score
    assert simulate(policy, answers, 0.625)[1] > simulate(fixed, answers, 0.625)[1] + 0.01


def test_temperatures_mend_what_is_too_sure():
    exits, answers = Exits(8, 4, (1, 2, 3)), answers_of()
    doubled = replace(answers, logits=2 * answers.logits)
    calibrate(exits, answers, CLASSES)
    before = exits.temperatures.clone()
    calibrate(exits, doubled, CLASSES)
    torch.testing.assert_close(exits.temperatures, 2 * before, rtol=0.1, atol=0)


def test_rivals_ask_every_exit():
    exits = Exits(8, 4, (1, 2, 3))
    for name, policy in rivals(exits, answers_of(), CLASSES).items():
        if name.startswith(("patience", "entropy", "learned")):
            assert policy.chains == ((1, 2, 3, 4),)


def test_mixtures_are_the_best_that_a_budget_pays_for():
    exits, answers = Exits(8, 4, (1, 2, 3)), answers_of()
    means = dict(zip((1, 2, 3, 4), answers.qualities(CLASSES).mean(0).tolist(), strict=True))
    policy = mixture(exits, answers, CLASSES, HashExit)
    for budget in (0.25, 0.4375, 0.5, 0.625, 0.75, 1.0):
        place = round(budget * GRID)
        index = policy.choice[place]
        (low, high), share = policy.chains[index], policy.thresholds[index][place]
        assert low + share * (high - low) <= 4 * budget + 1e-6
        reached = means[low] + share * (means[high] - means[low])
        for one, other in ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)):
            if one <= 4 * budget <= other:
                mixed = means[one] + (4 * budget - one) / (other - one) * (means[other] - means[one])
                assert reached >= mixed - 1e-6


def test_an_oracle_takes_the_cheapest_right_answers():
    wrong, right = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    paths = [[right, right, right], [wrong, right, right], [wrong, wrong, right], [wrong, wrong, wrong]]
    answers = ExitAnswers(
        torch.stack([torch.stack(path) for path in paths]), torch.zeros(4, 2, 8), torch.ones(4).long(),
        torch.full((4,), 5),
    )  # fmt: skip
    for budget, stops in (
        (1.0, [0, 1, 2, 0]),
        (7 / 16, [0, 1, 0, 0]),
        (5 / 16, [0, 1, 0, 0]),
        (0.25, [0] * 4),
    ):
        assert oracle(answers, CLASSES, (1, 2, 4), budget).tolist() == stops, budget


def test_an_oracle_of_numbers_goes_where_the_error_is_least():
    said = torch.tensor([[[0.5], [0.9], [1.0]], [[1.0], [0.0], [0.9]], [[0.0], [0.1], [1.0]]])
    answers = ExitAnswers(said, torch.zeros(3, 2, 8), torch.ones(3), torch.full((3,), 5))
    assert oracle(answers, NUMBERS, (1, 2, 4), 1.0).tolist() == [2, 0, 2]
    # Three of 12 layers go to the first exits; what is left pays for the last row's gain, the cheapest.
    assert oracle(answers, NUMBERS, (1, 2, 4), 6 / 12).tolist() == [0, 0, 2]
    assert oracle(answers, NUMBERS, (1, 2, 4), 5 / 12).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"exit_epochs": 0}, "expected --exit-epochs above 0"),
        ({"planner_objective": "gates"}, "no objective for exits"),
        ({"exit_learning_rate": 0}, "--exit-learning-rate to be a number above 0"),
        ({"planner": "ladder"}, "expected planner to be one of exits, upfront, stepwise, none, got 'ladder'"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InputError, match=text):
        Recipe(**settings)


def test_damaged_rivals_are_named(tuned, tmp_path):
    exits = Exits(8, 4, (1, 2, 3))
    for text in ("[]", "{", '{"a": {"type": "KeepAll"}}', '{"a": {"type": "EntropyExit", "chains": 3}}'):
        (tmp_path / "rivals.json").write_text(text)
        with pytest.raises(InputError, match="rivals.json"):
            read_rivals(tmp_path, exits)
