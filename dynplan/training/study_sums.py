"""What a study's parts come to: the planner against ordinary fine-tuning and against each rival, at equal
measured time, with standard errors over dev rows (paired bootstrap) and over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from dynplan.training.data import Task
from dynplan.training.evaluate import ORACLE
from dynplan.training.metrics import task_metrics

PREFIX = "prefix trained for itself"
STUDENT = "distilled student"
ORDINARY = "ordinary"
ALL = "dynplan keep-all"  # whose time the others' are shares of
TARGETS = ((0.75, 1.0), (0.5, 0.99), (0.33, 0.96))  # share of the time, and of ordinary fine-tuning's score
BATCHES = (32, 1)
_DRAWS = 500  # of the bootstrap
_BINS = 5
_NO_RIVALS = ("planner", ORDINARY, ALL, ORACLE, "Hugging Face (sdpa)")


@dataclass(frozen=True)
class _Point:
    """A contestant of one part at one budget: share of keep-all's time, score, and what it said."""

    budget: float
    time: float
    score: float
    draws: np.ndarray  # (DRAWS,), scores on rows drawn again


class _Part:
    """One task and seed, read from its file."""

    def __init__(self, values: dict) -> None:
        self.values = values
        self.task = Task(**{**values["task"], "labels": tuple(values["task"]["labels"])})
        self.labels = np.array(values["labels"])
        self.said = {tuple(key): np.array(logits) for key, logits in values["logits"]}
        self.picked = np.random.default_rng(0).integers(0, len(self.labels), (_DRAWS, len(self.labels)))
        self.rows = {(row["name"], row["budget"]): row for row in values["rows"]}
        self._points: dict[tuple, _Point] = {}

    @property
    def budgets(self) -> list[float]:
        """The planner's, rising."""
        return sorted(budget for name, budget in self.rows if name == "planner")

    def point(self, name: str, budget: float | None, batch: int) -> _Point:
        key = name, budget, batch
        if key not in self._points:
            stream = self.said.get((name, budget, "stream")) if batch == 1 else None
            logits = self.said[name, budget] if stream is None else stream
            mine, all_ = (
                self.rows[which]["latency_ms"][str(batch)] for which in ((name, budget), (ALL, None))
            )
            self._points[key] = _Point(
                1.0 if budget is None else budget,
                mine / all_,
                task_metrics(self.task, logits, self.labels)["score"],
                resampled_scores(self.task, logits, self.labels, self.picked),
            )
        return self._points[key]

    def planner_at(self, time: float, batch: int) -> tuple[float, np.ndarray]:
        """The planner's score at a share of keep-all's time, between the budgets that were measured, and on
        rows drawn again."""
        points = sorted((self.point("planner", b, batch) for b in self.budgets), key=lambda p: p.time)
        above = next((i for i, point in enumerate(points) if point.time >= time), len(points) - 1)
        high, low = points[above], points[max(above - 1, 0)]
        part = (time - low.time) / (high.time - low.time) if high.time > low.time else 1.0
        part = min(max(part, 0.0), 1.0)
        return (
            low.score + part * (high.score - low.score),
            low.draws + part * (high.draws - low.draws),
        )


@dataclass(frozen=True)
class _Gap:
    """A difference of scores of one part, and on rows drawn again."""

    task: str
    value: float
    draws: np.ndarray


def _summed(gaps: Sequence[_Gap]) -> dict:
    """Mean over tasks of the means over seeds, in points of 100, its standard error over dev rows and, where
    there are several seeds, over those; and each task's."""
    tasks = list(dict.fromkeys(gap.task for gap in gaps))
    by_task = {task: [gap for gap in gaps if gap.task == task] for task in tasks}
    values = {task: float(np.mean([gap.value for gap in own])) for task, own in by_task.items()}
    draws = {task: np.mean([gap.draws for gap in own], 0) for task, own in by_task.items()}
    spreads = [
        np.std([gap.value for gap in own], ddof=1) / len(own) ** 0.5
        for own in by_task.values()
        if len(own) > 1
    ]
    return {
        "points": 100 * float(np.mean(list(values.values()))),
        "standard_error": 100 * float(np.std(np.mean(list(draws.values()), 0))),
        "over_seeds": 100 * float(np.sqrt(np.sum(np.square(spreads))) / len(tasks)) if spreads else None,
        "tasks": {
            task: {"points": 100 * values[task], "standard_error": 100 * float(np.std(draws[task]))}
            for task in tasks
        },
    }


def collect(tasks: Sequence[str], files: Mapping[tuple[str, int], Path]) -> dict:
    """All parts that are there as one table, see the names below; JSON values.

    tasks, seeds, metrics, dev_rows, train_rows, model, recipe, machine, budgets; rows: of all parts, with
    score and times; targets: :data:`TARGETS` and what was reached; against_rivals; depths: how many samples
    stop where; paths: layers taken by length and by how sure the first exit is.
    """
    parts = {
        key: _Part(json.loads(place.read_text(encoding="utf-8")))
        for key, place in files.items()
        if place.exists()
    }
    every = list(parts.values())
    first = every[0].values if every else {}
    by_task = {task: [part for (name, _), part in parts.items() if name == task] for task in tasks}
    by_task = {task: own for task, own in by_task.items() if own}
    return {
        "tasks": list(by_task),
        "seeds": {task: [part.values["seed"] for part in own] for task, own in by_task.items()},
        "metrics": {task: own[0].task.metric for task, own in by_task.items()},
        "train_rows": {task: own[0].values["train_rows"] for task, own in by_task.items()},
        "dev_rows": {task: len(own[0].labels) for task, own in by_task.items()},
        **{name: first.get(name) for name in ("model", "recipe", "machine", "budgets")},
        "parts": len(parts),
        "rows": [
            {"task": task, "seed": seed, **{k: v for k, v in row.items() if k != "figures"},
             "score": row["figures"]["score"]}
            for (task, seed), part in parts.items() for row in part.values["rows"]
        ],
        "targets": [
            _target(parts, batch, *target) for batch in BATCHES for target in TARGETS if _timed(parts)
        ],
        "against_rivals": _against(parts) if _timed(parts) else [],
        "depths": _depths(by_task),
        "paths": _paths(by_task),
    }  # fmt: skip


def _timed(parts: dict[tuple[str, int], _Part]) -> bool:
    return bool(parts) and all(part.rows[ALL, None]["latency_ms"] for part in parts.values())


def _target(parts: dict, batch: int, time: float, kept: float) -> dict:
    """How the planner does at the largest budget whose mean measured time is within ``time``."""
    budgets = set.intersection(*(set(part.budgets) for part in parts.values()))
    tasks = [task for task, _ in parts]

    def mean(value) -> float:
        of = {task: np.mean([value(p) for (t, _), p in parts.items() if t == task]) for task in tasks}
        return float(np.mean(list(of.values())))

    found = {"batch": batch, "time": time, "share": kept, "budget": None}
    measured = {b: mean(lambda part, b=b: part.point("planner", b, batch).time) for b in budgets}
    within = [budget for budget in budgets if measured[budget] <= time]
    if not within:
        return found
    budget = max(within)
    gaps = []
    for (task, _), part in parts.items():
        mine, usual = part.point("planner", budget, batch), part.point(ORDINARY, None, batch)
        gaps.append(_Gap(task, mine.score - kept * usual.score, mine.draws - kept * usual.draws))
    mine = mean(lambda part: part.point("planner", budget, batch).score)
    usual = mean(lambda part: part.point(ORDINARY, None, batch).score)
    return found | {
        "budget": budget,
        "measured_time": measured[budget],
        "score": 100 * mine,
        "ordinary": 100 * usual,
        "reached": mine / usual if usual else None,
        "above_target": _summed(gaps),
    }


def _against(parts: dict) -> list[dict]:
    """The planner's score less each rival's at the rival's own measured time."""
    keys = dict.fromkeys(
        key for part in parts.values() for key in part.rows if key[0] not in _NO_RIVALS and key[1] is not None
    )
    found = []
    for name, budget in sorted(keys, key=lambda key: (-key[1], key[0])):
        for batch in BATCHES:
            gaps, times = [], []
            for (task, _), part in parts.items():
                if (name, budget) in part.rows:
                    theirs = part.point(name, budget, batch)
                    score, draws = part.planner_at(theirs.time, batch)
                    gaps.append(_Gap(task, score - theirs.score, draws - theirs.draws))
                    times.append(theirs.time)
            where = {"rival": name, "budget": budget, "batch": batch, "parts": len(gaps)}
            found.append({**where, "time": float(np.mean(times)), **_summed(gaps)})
    return found


def _key(budget: float, batch: int) -> tuple:
    return ("planner", budget, "stream") if batch == 1 else ("planner", budget)


def _taken(part: _Part, budget: float, batch: int) -> np.ndarray:
    """Layers that each sample took, ``(N,)``."""
    depths = {tuple(key): taken for key, taken in part.values["depths"]}
    return np.array(depths[_key(budget, batch)])


def _depths(by_task: dict[str, list[_Part]]) -> list[dict]:
    found = []
    for task, own in by_task.items():
        for budget in own[0].values["budgets"]:
            for batch in BATCHES:
                taken = np.concatenate([_taken(part, budget, batch) for part in own])
                layers, counts = np.unique(taken, return_counts=True)
                shares = dict(zip(map(str, layers.tolist()), (counts / len(taken)).tolist(), strict=True))
                found.append({"task": task, "budget": budget, "batch": batch, "share": shares})
    return found


def _paths(by_task: dict[str, list[_Part]]) -> list[dict]:
    """Mean layers taken in fifths of the rows, by length in tokens and by the first exit's sureness."""
    found = []
    for task, own in by_task.items():
        for budget in own[0].values["budgets"]:
            for by in ("lengths", "sureness"):
                places, layers = [], []
                for part in own:
                    values, taken = np.array(part.values[by]), _taken(part, budget, 32)
                    fifths = np.array_split(np.argsort(values, kind="stable"), _BINS)
                    places.append([values[rows].mean() for rows in fifths if len(rows)])
                    layers.append([taken[rows].mean() for rows in fifths if len(rows)])
                found.append(
                    {
                        "task": task,
                        "budget": budget,
                        "by": by,
                        "values": np.mean(places, 0).tolist(),
                        "layers": np.mean(layers, 0).tolist(),
                    }
                )
    return found


def scores_by_task(results: dict) -> dict[tuple, dict[str, float]]:
    """(name, budget, batch) -> task -> mean score over seeds."""
    table: dict[tuple, dict[str, list[float]]] = {}
    for row in results["rows"]:
        streamed = row["stream_score"] is not None
        for batch, score in ((32, row["score"]), (1, row["stream_score"] if streamed else row["score"])):
            key = row["name"], row["budget"], batch
            table.setdefault(key, {}).setdefault(row["task"], []).append(score)
    return {
        key: {task: float(np.mean(values)) for task, values in scores.items()}
        for key, scores in table.items()
    }


def times_by_task(results: dict) -> dict[tuple, dict[str, float]]:
    """(name, budget, batch) -> task -> milliseconds per sample, mean over seeds, of those that were timed."""
    table: dict[tuple, dict[str, list[float]]] = {}
    for row in results["rows"]:
        for batch, time in row["latency_ms"].items():
            key = row["name"], row["budget"], int(batch)
            table.setdefault(key, {}).setdefault(row["task"], []).append(time)
    return {
        key: {task: float(np.mean(values)) for task, values in times.items()} for key, times in table.items()
    }


def resampled_scores(task: Task, logits: np.ndarray, labels: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """The task's score on each row of ``picked``, all at once: scikit-learn takes milliseconds for one.

    picked: integer (draws, N), rows that each draw holds. F1 and Matthews are for two classes.
    """
    if task.kind == "regression":
        said, wanted = logits.reshape(len(labels))[picked], labels[picked]
        figures = {
            "pearson": lambda: _correlations(said, wanted),
            "spearman": lambda: _correlations(rankdata(said, axis=1), rankdata(wanted, axis=1)),
        }
    else:
        said, wanted = logits.argmax(1)[picked], labels[picked]
        hits = [((said == a) & (wanted == b)).sum(1).astype(float) for a in (1, 0) for b in (1, 0)]
        both, false, missed, neither = hits
        scale = (both + false) * (both + missed) * (neither + false) * (neither + missed)
        figures = {
            "accuracy": lambda: (said == wanted).mean(1),
            "f1": lambda: 2 * both / np.maximum(2 * both + false + missed, 1),
            "matthews": lambda: (both * neither - false * missed) / np.sqrt(np.maximum(scale, 1)),
        }
    return np.mean([figures[name]() for name in task.metric.split("+")], 0)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row of ``a`` with that of ``b``; 0 where one is constant."""
    a, b = (values - values.mean(1, keepdims=True) for values in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(scale > 0, scale, 1)
