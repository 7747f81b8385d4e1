"""The study: planners with exits against their rivals and against ordinary fine-tuning, task by task.

Every task and seed is a part of its own: trainings (with exits; the ordinary one; models cut to their first
layers and trained for themselves; one of them taught by the ordinary model), and one evaluation of all of
them on the dev rows. A part that is finished is a file that is there whole, so that a killed study goes on
where it was. Several processes train together; the first one alone evaluates and writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

import dynplan
from dynplan.benchmarking import environment
from dynplan.errors import InputError
from dynplan.files import fresh_folder, settle_folder, write_whole, writing
from dynplan.loading import load_tokenizer
from dynplan.training.data import encode_rows
from dynplan.training.evaluate import evaluate, plain_model
from dynplan.training.progress import say
from dynplan.training.ranks import first_finds, processes, share_of_batch
from dynplan.training.recipe import finetune
from dynplan.training.record import load_run, read_rivals
from dynplan.training.rows import read_rows
from dynplan.training.settings import Recipe
from dynplan.training.study_sums import PREFIX, STUDENT, collect

GLUE = ("sst2", "cola", "mrpc", "rte", "stsb", "qnli")
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
        single: tasks that get the first seed alone.
        budgets: to be compared at, below 1.
        curve: more budgets, for the planner alone.
        train_rows: at most so many of each task's, the first ones.
        recipe: of all trainings; epochs of the ordinary one are those with exits.
        own_subsets: shares of the layers at which a prefix is trained for itself.
        students: shares of the layers at which a prefix is taught by the ordinary model.
        own_tasks: tasks for which prefixes and students are trained; None: all.
        seconds: spent on measuring time in each part.
    """

    data: Path
    model: Path
    output: Path
    tasks: Sequence[str] = GLUE
    seeds: Sequence[int] = (0,)
    single: Sequence[str] = ()
    budgets: Sequence[float] = (0.75, 0.5, 0.33)
    curve: Sequence[float] = (0.9, 0.7, 0.6, 0.45, 0.4, 0.3)
    train_rows: int = 8000
    recipe: Recipe = field(default_factory=Recipe)
    own_subsets: Sequence[float] = (0.5, 0.33)
    students: Sequence[float] = (0.5,)
    own_tasks: Sequence[str] | None = None
    seconds: float = 60.0

    def parts(self) -> list[tuple[str, int]]:
        """Task and seed of each part, all tasks' first seed first."""
        return [
            (task, seed)
            for number, seed in enumerate(self.seeds)
            for task in self.tasks
            if number == 0 or task not in self.single
        ]


def run_study(study: Study, progress: bool = True) -> dict:
    """Run what is not there yet, and write ``results.json``; returns it.

    Raises InputError for tasks without files, and for a batch that several processes cannot share, before
    anything is trained.
    """
    ranks = processes()
    progress = progress and ranks.is_main_process
    share_of_batch(study.recipe.batch_size)
    files = {task: (_file(study, task, "train"), _file(study, task, "dev")) for task in study.tasks}
    parts = study.parts()
    wanting = [part for part in parts if not first_finds(_result(study, *part).exists)]
    begun = time.monotonic()
    say(f"{len(parts) - len(wanting)} of {len(parts)} parts are there already", progress)
    for number, (task, seed) in enumerate(wanting):
        left = f", about {_left(begun, number, len(wanting))} left" if number else ""
        say(f"part {number + 1} of {len(wanting)}: {task}, seed {seed}{left}", progress)
        _run_part(study, task, seed, *files[task], progress)
    results = collect(study.tasks, {part: _result(study, *part) for part in parts})
    if ranks.is_main_process:
        with writing(study.output):
            write_whole(study.output / "results.json", json.dumps(results, indent=1) + "\n")
    ranks.wait_for_everyone()
    return results


def _left(begun: float, done: int, parts: int) -> str:
    """Time that the other parts take, if they take what these did."""
    minutes = (time.monotonic() - begun) / done * (parts - done) / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"


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

    def fitted(name: str, source: Path, settings: Recipe, teacher: Path | None = None) -> Path:
        place = folder / name
        if not first_finds((place / "dynplan.json").exists):
            say(f"{task}, seed {seed}: {name}", progress)
            options = {"resume": True, "progress": progress, "teacher": teacher}
            finetune(source, rows, place, task, settings, **options)
        return place

    planned = fitted("exits", study.model, recipe)
    alone = {("ordinary", None): fitted("ordinary", study.model, ordinary)}
    layers = dynplan.from_pretrained(planned).dynplan.num_layers

    def cut(share: float) -> tuple[int, Path]:
        count = max(1, round(share * layers))
        return count, _cut(study.model, count, folder / f"cut-{count}-of-{layers}")

    if study.own_tasks is None or task in study.own_tasks:
        for share in study.own_subsets:
            count, source = cut(share)
            alone[PREFIX, share] = fitted(f"first-{count}", source, ordinary)
        for share in study.students:
            count, source = cut(share)
            teacher = alone["ordinary", None]
            alone[STUDENT, share] = fitted(f"student-{count}", source, ordinary, teacher)

    ranks = processes()
    if ranks.is_main_process:
        _evaluate_part(study, task, seed, planned, alone, len(rows), held_out, progress)
    ranks.wait_for_everyone()


def _evaluate_part(
    study: Study,
    task: str,
    seed: int,
    planned: Path,
    alone: dict[tuple[str, float | None], Path],
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
        curve=study.curve,
        others={key: dynplan.from_pretrained(place).eval() for key, place in alone.items()},
        said=said,
    )
    answers = said.pop("exits")
    first = model.dynplan.planner.sureness(0, answers.logits[:, 0], answers.pooled[:, 0])
    result = {
        "task": asdict(kind),
        "seed": seed,
        "model": Path(study.model).resolve().name,
        "recipe": recipe,
        "train_rows": train_rows,
        "machine": environment(),
        "budgets": list(study.budgets),
        "rows": [asdict(row) for row in table],
        "labels": answers.labels.tolist(),
        "lengths": answers.lengths.tolist(),
        "sureness": _rounded(first.detach().numpy()),
        "depths": [
            [list(key), prediction.plan.sum(1).tolist()]
            for key, prediction in said.items()
            if key[0] == "planner"
        ],
        "logits": [[list(key), _rounded(prediction.logits)] for key, prediction in said.items()],
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
