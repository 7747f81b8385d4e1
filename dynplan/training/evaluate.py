"""Score, share of compute and measured latency of a checkpoint, policy by policy, beside the unmodified
model.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import dynplan
from dynplan.benchmarking import interleave
from dynplan.errors import InputError
from dynplan.loading import load
from dynplan.nn.exits import Exits
from dynplan.policies import KeepAll, PlannerPolicy, Policy, RandomPath, StaticPath
from dynplan.stream_budget import StreamBudget
from dynplan.training.data import EncodedDataset, Task
from dynplan.training.exits import ExitAnswers, exit_answers
from dynplan.training.metrics import task_metrics
from dynplan.training.predict import beside, make_batches, predict
from dynplan.training.progress import say, steps
from dynplan.training.rivals import oracle

ORACLE = "oracle (no policy: it knows the labels)"
RANDOM_SEEDS = 3


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: of the contestant.
        budget: share of layer work, or None without one.
        figures: the task's, with ``score``.
        sample_layers: share of the sample-layers run, 0..1.
        token_layers: share of the token-layers run, 0..1.
        spread: standard deviation of ``score`` over the seeds of a random path, else 0.
        rival_score: for a planner, what best fixed subsets score when mixed to the same share of layers.
        stream_score: of policies with exits one text at a time, under a stream's budget, with which batch 1
            is timed.
        stream_layers: share of the sample-layers run then.
        latency_ms: median milliseconds per sentence at each batch size, keyed ``"1"`` and ``"32"``; empty for
            what cannot be run.
    """

    name: str
    budget: float | None
    figures: dict[str, float]
    sample_layers: float
    token_layers: float
    spread: float = 0.0
    rival_score: float | None = None
    stream_score: float | None = None
    stream_layers: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)


@dataclass
class _Contestant:
    name: str
    budget: float | None
    model: nn.Module
    policies: list[Policy | None]
    depth: float = 1.0  # share of the checkpoint's layers that the model has
    stream: StreamBudget | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 1 and getattr(self.policies[0], "takes_stream", False):
            self.stream = StreamBudget(self.budget)

    def arm(self, index: int = 0, batch_size: int = 32) -> None:
        if self.policies[index] is not None:
            control = self.model.dynplan
            control.policy, control.budget = self.policies[index], None
            if self.policies[index].takes_budget:
                control.budget = self.stream if batch_size == 1 and self.stream else self.budget

    def run(self, batch: dict) -> None:
        self.arm(batch_size=len(batch["input_ids"]))
        self.model(**batch)


def plain_model(folder: str | Path) -> nn.Module:
    """The checkpoint as Hugging Face alone would load it: no dynplan, sdpa attention, float32.

    Args:
        folder: that ``finetune`` or ``save_pretrained`` wrote.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: a folder that cannot be loaded.
    """
    return load("model", folder, _plain).eval()


def _plain(folder: str | Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def reduced_twin(model: nn.Module, weights: str) -> nn.Module:
    """The swapped ``model`` again, on the same parameters, with products in ``weights``."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return dynplan.swap(dynplan.unswap(copy.deepcopy(model, shared)), KeepAll(), weights=weights)


def contestants(
    model: nn.Module,
    plain: nn.Module,
    static: dict,
    budgets,
    weights: tuple[str, ...] = (),
    rivals: Mapping[str, Policy] | None = None,
    curve: Sequence[float] = (),
    others: Mapping[tuple[str, float | None], nn.Module] | None = None,
) -> list[_Contestant]:
    """Hugging Face, keep-all, then planner, random path and best fixed subset at every budget, or planner and
    ``rivals`` where it has exits; the planner alone at those of ``curve``; ``others``; then, for each of
    ``weights``, keep-all and the planner at every budget below 1 once more.

    Raises InputError when the model's policy is not a planner's.
    """
    planner = model.dynplan.planner
    if planner is None:
        raise InputError(
            f"checkpoint: expected a model with a planner, got policy {type(model.dynplan.policy).__name__}; "
            "train one with `dynplan finetune`"
        )
    rows = [
        _Contestant("Hugging Face (sdpa)", None, plain, [None]),
        _Contestant("dynplan keep-all", None, model, [KeepAll()]),
    ]
    exits = isinstance(planner, Exits)

    def planned(budget: float) -> list[Policy]:
        return [model.dynplan.policy if exits else PlannerPolicy(planner, budget)]

    for budget in budgets:
        rows.append(_Contestant("planner", budget, model, planned(budget)))
        if budget < 1 and exits:
            rows += [_Contestant(name, budget, model, [rival]) for name, rival in (rivals or {}).items()]
        elif budget < 1:
            draws = [RandomPath(budget, seed=seed) for seed in range(RANDOM_SEEDS)]
            rows.append(_Contestant("random path", budget, model, draws))
            rows.append(_Contestant("best fixed subset", budget, model, [StaticPath(static, budget)]))
    rows += [_Contestant("planner", budget, model, planned(budget)) for budget in curve]
    layers = model.config.num_hidden_layers
    for (name, budget), other in (others or {}).items():
        depth = other.config.num_hidden_layers / layers
        rows.append(_Contestant(name, budget, other, [None], depth))
    for dtype in weights:
        twin = reduced_twin(model, dtype)
        rows.append(_Contestant(f"dynplan keep-all, {dtype}", None, twin, [KeepAll()]))
        rows += [
            _Contestant(f"planner, {dtype}", budget, twin, planned(budget))
            for budget in budgets
            if budget < 1
        ]
    return rows


def evaluate(
    model: nn.Module,
    plain: nn.Module,
    static: dict[int, tuple[int, ...]],
    dataset: EncodedDataset,
    task: Task,
    tokenizer,
    budgets: tuple[float, ...] = (0.75, 0.5),
    batch_sizes: tuple[int, ...] = (1, 32),
    seconds: float = 30.0,
    progress: bool = True,
    weights: tuple[str, ...] = (),
    rivals: Mapping[str, Policy] | None = None,
    curve: Sequence[float] = (),
    others: Mapping[tuple[str, float | None], nn.Module] | None = None,
    said: dict | None = None,
) -> list[Row]:
    """Score every contestant on a dataset in batches of 32, then time them in turn.

    Timing goes round and round over contestants and batches and takes medians, so that a noisy machine
    disturbs all alike. Each sentence is tokenized before; a time is that of the model's forward alone.

    Args:
        model: swapped, with a planner.
        plain: the same checkpoint without dynplan, see :func:`plain_model`.
        static: best fixed subset of each size, size -> layers.
        dataset: of :func:`encode_rows`.
        task: what its labels mean.
        tokenizer (transformers.PreTrainedTokenizerBase): of the model.
        budgets: shares of layer work, 0..1.
        batch_sizes: that are timed.
        seconds: for all timing together; 0: none.
        progress: whether a bar is shown.
        weights: "int8", "bfloat16": contestants on such weights besides.
        rivals: other ways of leaving at the planner's exits, by name.
        curve: more budgets, 0..1, for the planner alone.
        others: swapped models to compare with, by name and the budget that they stand at.
        said: receives each contestant's :class:`~dynplan.training.predict.Prediction`, in batches under
            (name, budget) and one text at a time under (name, budget, "stream"), and under "exits" the
            :class:`~dynplan.training.exits.ExitAnswers`.

    Returns:
        A row for each contestant.

    Raises:
        InputError: the model's policy is not a planner's.
    """
    policy, budget = model.dynplan.policy, model.dynplan.budget
    entrants = contestants(model, plain, static, budgets, weights, rivals, curve, others)
    batches = make_batches(dataset, tokenizer, 32)
    singles = make_batches(dataset, tokenizer, 1)
    rows = []
    say(f"scores: {len(entrants)} contestants, {len(dataset)} rows", progress)
    for contestant in steps(entrants, "scores", progress):
        predictions = []
        for index in range(len(contestant.policies)):
            contestant.arm(index)
            predictions.append(predict(contestant.model, batches, task))
        figures = [prediction.figures(task) for prediction in predictions]
        if said is not None:
            said[contestant.name, contestant.budget] = predictions[0]
        rows.append(
            Row(
                contestant.name,
                contestant.budget,
                {key: fmean(each[key] for each in figures) for key in figures[0]},
                contestant.depth * fmean(prediction.sample_layers for prediction in predictions),
                contestant.depth * fmean(prediction.token_layers for prediction in predictions),
                pstdev(each["score"] for each in figures),
            )
        )
        if contestant.stream is not None:
            contestant.arm(batch_size=1)
            alone = predict(contestant.model, singles, task)
            if said is not None:
                said[contestant.name, contestant.budget, "stream"] = alone
            rows[-1].stream_score = alone.figures(task)["score"]
            rows[-1].stream_layers = alone.sample_layers
    planner = model.dynplan.planner
    answers = exit_answers(model, planner, batches, task) if isinstance(planner, Exits) else None
    _rival_scores(model, static, batches, task, rows, answers)
    _time(entrants, rows, dataset, tokenizer, batch_sizes, seconds, progress)
    if answers is not None:
        rows += _oracles(planner, answers, task, [budget for budget in budgets if budget < 1])
        if said is not None:
            said["exits"] = answers
    model.dynplan.policy, model.dynplan.budget = policy, budget
    return rows


@torch.inference_mode()
def _time(entrants, rows, dataset, tokenizer, batch_sizes, seconds, progress) -> None:
    for batch_size in batch_sizes:
        say(f"latency, batch {batch_size}: {seconds / len(batch_sizes):.0f} s or a little more", progress)
        drawn = dataset.sample(64 if batch_size == 1 else 3 * batch_size, seed=1)
        batches = make_batches(drawn, tokenizer, batch_size)
        for row in rows:
            row.latency_ms[str(batch_size)] = 0.0
        for batch in steps(batches, f"latency, batch {batch_size}", progress):
            batch.pop("labels")
            calls = {
                index: partial(entrant.run, beside(entrant.model, batch))
                for index, entrant in enumerate(entrants)
            }
            start = time.perf_counter()
            interleave(calls, rounds=1, warmup=0)
            once = time.perf_counter() - start
            share = seconds / len(batch_sizes) / len(batches)
            timings = interleave(calls, rounds=min(50, max(2, int(share / once))), warmup=0)
            for index, row in enumerate(rows):
                row.latency_ms[str(batch_size)] += 1e3 * timings[index].p50 / len(drawn)


def _oracles(planner: Exits, answers: ExitAnswers, task: Task, budgets: list[float]) -> list[Row]:
    rows, depths = [], torch.tensor((*planner.depths, planner.num_layers))
    for budget in budgets:
        stops = oracle(answers, task, depths.tolist(), budget)
        logits = answers.logits[torch.arange(len(stops)), stops].numpy()
        layers, work = depths[stops].double(), depths[stops] * answers.lengths
        rows.append(
            Row(
                ORACLE,
                budget,
                task_metrics(task, logits, answers.labels.numpy()),
                float(layers.mean()) / planner.num_layers,
                float(work.sum() / (planner.num_layers * answers.lengths.sum())),
            )
        )
    return rows


def _rival_scores(model, static, batches, task, rows: list[Row], answers: ExitAnswers | None) -> None:
    """Give each planner row the score of what is fixed, mixed to the very same share of compute: best fixed
    subsets, or fixed depths where there are exits.

    A subset holds whole layers, a planner's batch need not; running one subset on some samples and a larger
    one on the others gives any share between, and a score between theirs in proportion.
    """
    layers, curve = model.config.num_hidden_layers, {}
    policies = {size: StaticPath(static) for size in (0, *static, layers)}
    if answers is not None:
        policies = {0: StaticPath({})}
        for index, depth in enumerate((*model.dynplan.planner.depths, layers)):
            figures = task_metrics(task, answers.logits[:, index].numpy(), answers.labels.numpy())
            curve[depth / layers] = figures["score"]
    for size, policy in policies.items():
        model.dynplan.policy, model.dynplan.budget = policy, size / layers
        curve[size / layers] = predict(model, batches, task).figures(task)["score"]
    for row in rows:
        if row.name == "planner":
            row.rival_score = best_mixture(curve, row.sample_layers)


def best_mixture(curve: dict[float, float], share: float) -> float:
    """The best score that mixing two points of ``curve`` (share -> score) reaches with ``share`` of the
    layers.
    """
    reached = [
        curve[low] + (curve[high] - curve[low]) * (share - low) / (high - low)
        for low in curve
        for high in curve
        if low <= share <= high and low < high
    ]
    return max(reached)


def planner_plans(
    model: nn.Module, dataset: EncodedDataset, tokenizer, task: Task, budgets
) -> tuple[dict, np.ndarray]:
    """The planner's plans in batches of 32 rows, in order.

    Args:
        model: swapped, with a planner.
        dataset: of :func:`encode_rows`.
        tokenizer (transformers.PreTrainedTokenizerBase): of the model.
        task: what the labels of the dataset mean.
        budgets (Iterable[float]): shares of layer work, 0..1.

    Returns:
        Budget -> bool ``(N, L)``; and the rows' lengths in tokens, int ``(N,)``.

    Raises:
        AttributeError: the model is not swapped.
    """
    batches, plans, before = make_batches(dataset, tokenizer, 32), {}, model.dynplan.budget
    for budget in budgets:
        model.dynplan.budget = budget
        plans[budget] = predict(model, batches, task).plan.numpy()
    model.dynplan.budget = before
    return plans, np.array(dataset.lengths)
