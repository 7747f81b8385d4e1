"""The study: planners with exits against their rivals and against ordinary fine-tuning, task by task.

Every task and seed is a part of its own: three trainings (exits; the ordinary one; a model cut to its first
layers and trained for itself), and one evaluation of all of them on the dev rows. A part that is finished is
a file that is there whole, so that a killed study goes on where it was. Several processes train together; the
first one alone evaluates and writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from transformers import AutoModel

import dynplan
from dynplan.benchmarking import environment
from dynplan.errors import InputError
from dynplan.files import fresh_folder, settle_folder, write_whole, writing
from dynplan.loading import load_tokenizer
from dynplan.training.data import Task, encode_rows
from dynplan.training.evaluate import Row, evaluate, plain_model
from dynplan.training.metrics import task_metrics
from dynplan.training.predict import make_batches, predict
from dynplan.training.progress import say
from dynplan.training.ranks import first_finds, processes, share_of_batch
from dynplan.training.recipe import finetune
from dynplan.training.record import load_run, read_rivals
from dynplan.training.rows import read_rows
from dynplan.training.settings import Recipe

GLUE = ("sst2", "cola", "mrpc", "rte", "stsb", "qnli")
DRAWS = 500  # of the bootstrap
_KINDS = (".jsonl", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True)
class Study:
    """What is studied.

    Attributes:
        data: a folder that holds one for each task, with files ``train`` and ``dev`` in any form that
            :func:`~dynplan.training.read_rows` reads.
        model: folder of the pretrained encoder.
        output: receives a folder per part, and the results.
        tasks: GLUE's names.
        seeds: of each task.
        budgets: to be compared at, below 1.
        train_rows: at most so many of each task's, the first ones.
        recipe: of all trainings; epochs of the ordinary one are those with exits.
        own_subsets: shares of the layers at which a prefix is trained for itself.
        seconds: spent on measuring time in each part.
    """

    data: Path
    model: Path
    output: Path
    tasks: Sequence[str] = GLUE
    seeds: Sequence[int] = (0,)
    budgets: Sequence[float] = (0.75, 0.5, 0.33)
    train_rows: int = 8000
    recipe: Recipe = field(default_factory=Recipe)
    own_subsets: Sequence[float] = (0.5, 0.33)
    seconds: float = 60.0


def run_study(study: Study, progress: bool = True) -> dict:
    """Run what is not there yet, and write ``results.json``; returns it.

    Raises InputError for tasks without files, and for a batch that several processes cannot share, before
    anything is trained.
    """
    ranks = processes()
    progress = progress and ranks.is_main_process
    share_of_batch(study.recipe.batch_size)
    files = {task: (_file(study, task, "train"), _file(study, task, "dev")) for task in study.tasks}
    parts = [(task, seed) for seed in study.seeds for task in study.tasks]
    for number, (task, seed) in enumerate(parts, 1):
        say(f"part {number} of {len(parts)}: {task}, seed {seed}", progress)
        if not first_finds(_result(study, task, seed).exists):
            _run_part(study, task, seed, *files[task], progress)
    results = collect(study)
    if ranks.is_main_process:
        with writing(study.output):
            write_whole(study.output / "results.json", json.dumps(results, indent=1) + "\n")
    ranks.wait_for_everyone()
    return results


def _file(study: Study, task: str, split: str) -> Path:
    folder = Path(study.data) / task
    names = [f"{split}{kind}{packed}" for kind in _KINDS for packed in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"study: expected {split} rows of {task} in {folder} ({', '.join(names)}), got none")


def _result(study: Study, task: str, seed: int) -> Path:
    return Path(study.output) / f"{task}-{seed}" / "result.json"


def _run_part(study: Study, task: str, seed: int, train: Path, dev: Path, progress: bool) -> None:
    folder = _result(study, task, seed).parent
    rows, held_out = read_rows(train)[: study.train_rows], read_rows(dev)
    recipe = replace(study.recipe, seed=seed, planner="exits")
    ordinary = replace(recipe, planner="none", plain_epochs=recipe.plain_epochs + recipe.exit_epochs)

    def fitted(name: str, source: Path, settings: Recipe) -> Path:
        place = folder / name
        if not first_finds((place / "dynplan.json").exists):
            say(f"{task}, seed {seed}: {name}", progress)
            finetune(source, rows, place, task, settings, resume=True, progress=progress)
        return place

    planned = fitted("exits", study.model, recipe)
    alone = {"ordinary": fitted("ordinary", study.model, ordinary)}
    layers = dynplan.from_pretrained(planned).dynplan.num_layers
    for share in study.own_subsets:
        count = max(1, int(share * layers + 1e-6))
        cut = _cut(study.model, count, folder / f"first-{count}-of-{layers}")
        alone[f"first {count} layers, trained for themselves"] = fitted(f"first-{count}", cut, ordinary)

    ranks = processes()
    if ranks.is_main_process:
        _evaluate_part(study, task, seed, planned, alone, len(rows), held_out, progress)
    ranks.wait_for_everyone()


def _evaluate_part(
    study: Study,
    task: str,
    seed: int,
    planned: Path,
    alone: dict[str, Path],
    train_rows: int,
    held_out: list[dict],
    progress: bool,
) -> None:
    """All contestants on the dev rows, and the part's file; what only resuming needs goes."""
    folder = _result(study, task, seed).parent
    kind, recipe, _ = load_run(planned)
    tokenizer = load_tokenizer(planned)
    dataset = encode_rows(held_out, kind, tokenizer, recipe["max_length"])
    model, said = dynplan.from_pretrained(planned), {}
    table = evaluate(
        model,
        plain_model(planned),
        {},
        dataset,
        kind,
        tokenizer,
        (1.0, *study.budgets),
        seconds=study.seconds,
        progress=progress,
        rivals=read_rivals(planned, model.dynplan.planner),
        logits=said,
    )
    batches = make_batches(dataset, tokenizer, 32)
    for name, place in alone.items():
        prediction = predict(dynplan.from_pretrained(place).eval(), batches, kind)
        depth = prediction.plan.shape[1] / model.dynplan.num_layers
        table.append(Row(name, None, prediction.figures(kind), depth, depth))
        said[name, None] = prediction.logits
    labels = np.array([item["labels"] for item in dataset.items])
    result = {
        "task": asdict(kind),
        "seed": seed,
        "train_rows": train_rows,
        "machine": environment(),
        "rows": [asdict(row) for row in table],
        "labels": labels.tolist(),
        "logits": [[list(key), _rounded(values)] for key, values in said.items()],
    }
    with writing(folder):
        write_whole(_result(study, task, seed), json.dumps(result) + "\n")
    for place in folder.glob("*/*-checkpoints"):
        shutil.rmtree(place)


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), 4).tolist()


def _cut(source: Path, layers: int, folder: Path) -> Path:
    """The pretrained model with its first layers alone, as a folder."""
    ranks = processes()
    if ranks.is_main_process and not folder.exists():
        with writing(folder):
            unfinished = fresh_folder(folder.with_name(f".unfinished-{folder.name}"))
            model = AutoModel.from_pretrained(source, num_hidden_layers=layers, dtype=torch.float32)
            model.save_pretrained(unfinished)
            load_tokenizer(source).save_pretrained(unfinished)
            settle_folder(unfinished, folder)
    ranks.wait_for_everyone()
    return folder


def collect(study: Study) -> dict:
    """All parts as one table: scores of each policy at each budget and of ordinary fine-tuning, and how far
    the planner is above each rival, with its standard error over dev rows (paired bootstrap).
    """
    parts = {}
    for task in study.tasks:
        for seed in study.seeds:
            place = _result(study, task, seed)
            if place.exists():
                parts[task, seed] = json.loads(place.read_text(encoding="utf-8"))
    summary = {
        "tasks": list(study.tasks),
        "seeds": list(study.seeds),
        "parts": len(parts),
        "rows": [
            {"task": task, "seed": seed, **{k: v for k, v in row.items() if k != "figures"},
             "score": row["figures"]["score"]}
            for (task, seed), part in parts.items() for row in part["rows"]
        ],
    }  # fmt: skip
    summary["against_rivals"] = _against(parts, study)
    return summary


def _against(parts: dict, study: Study) -> list[dict]:
    """The planner's score less each rival's, mean over tasks and seeds, in points of 100."""
    found = []
    names = {name for part in parts.values() for (name, *_), _ in part["logits"]}
    rivals = sorted(name for name in names if name.endswith((" exit", " depth")))
    for budget in study.budgets:
        for mode in ([], ["stream"]):
            for rival in rivals:
                gaps, draws = [], []
                for part in parts.values():
                    said = {tuple(key): np.array(values) for key, values in part["logits"]}
                    mine, theirs = (said.get((name, budget, *mode)) for name in ("planner", rival))
                    if mine is None or theirs is None:
                        continue
                    task = Task(**{**part["task"], "labels": tuple(part["task"]["labels"])})
                    labels = np.array(part["labels"])
                    gaps.append(_score(task, mine, labels) - _score(task, theirs, labels))
                    draws.append(_bootstrap(task, mine, theirs, labels))
                if gaps:
                    spread = np.std(np.mean(draws, 0))
                    found.append(
                        {
                            "budget": budget,
                            "batch": 1 if mode else 32,
                            "rival": rival,
                            "points": 100 * float(np.mean(gaps)),
                            "standard_error": 100 * float(spread),
                            "parts": len(gaps),
                        }
                    )
    return found


def _score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    return task_metrics(task, logits, labels)["score"]


def _bootstrap(task: Task, mine: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Differences of the two scores on rows drawn again and again, the same ones for both."""
    picked = np.random.default_rng(0).integers(0, len(labels), (DRAWS, len(labels)))
    return resampled_scores(task, mine, labels, picked) - resampled_scores(task, theirs, labels, picked)


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


def report_lines(results: dict) -> list[str]:
    """The tables as Markdown: scores by task, then the planner against its rivals."""
    tasks = results["tasks"]
    table: dict[tuple, dict[str, list]] = {}
    for row in results["rows"]:
        for batch, score in ((32, row["score"]), (1, row["stream_score"])):
            if score is not None:
                key = (row["name"], row["budget"], batch)
                table.setdefault(key, {}).setdefault(row["task"], []).append(score)
    lines = _markdown(("policy", "budget", "batch", *tasks, "mean"), 1)
    for (name, budget, batch), scores in table.items():
        cells = [100 * np.mean(scores[task]) if task in scores else np.nan for task in tasks]
        shown = ["" if np.isnan(cell) else f"{cell:.1f}" for cell in (*cells, np.mean(cells))]
        lines.append(_line((name, "" if budget is None else f"{budget:g}", batch, *shown)))
    lines += ["", *_markdown(("rival", "budget", "batch", "planner above it, points", "standard error"), 1)]
    for row in results["against_rivals"]:
        figures = f"{row['points']:+.2f}", f"{row['standard_error']:.2f}"
        lines.append(_line((row["rival"], f"{row['budget']:g}", row["batch"], *figures)))
    return lines


def _markdown(header: tuple, words: int) -> list[str]:
    """The first two lines of a table whose first ``words`` columns are words."""
    return [_line(header), _line((":--",) * words + ("--:",) * (len(header) - words))]


def _line(cells: Sequence) -> str:
    return f"| {' | '.join(map(str, cells))} |"
