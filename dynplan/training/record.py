"""What a run's folder says about the run: its task and settings, and the fixed subsets it found."""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from dynplan.errors import InputError
from dynplan.files import write_whole, writing
from dynplan.nn.exits import Exits
from dynplan.policies import ConfidenceExit, Policy, StaticPath
from dynplan.training.data import TASK_NAMES, Task
from dynplan.training.settings import Recipe

RECIPE = "recipe.json"
STATIC = "static.json"
RIVALS = "rivals.json"


def check_output(folder: Path, resume: bool = False) -> Path:
    """Make a folder and see that it can be written, before any time is spent.

    Args:
        folder: of a run.
        resume: whether it may hold a run already.

    Returns:
        The folder.

    Raises:
        InputError: it cannot be written, or holds a run already and ``resume`` is not set.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    if not resume and (folder / RECIPE).exists():
        raise InputError(
            f"output: expected an empty folder, got {folder} with a run in it; resume it or choose another"
        )
    return folder


def describe_run(
    task: Task,
    recipe: Recipe,
    model: Path,
    rows: list[dict],
    processes: int = 1,
    teacher: str | Path | None = None,
) -> dict:
    """What ``recipe.json`` holds. The rows are known again by their hash."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    described = {
        "task": asdict(task),
        "recipe": asdict(recipe),
        "model": model.resolve().name,
        "rows": {"count": len(rows), "sha256": digest},
        "processes": processes,
        **({} if teacher is None else {"teacher": Path(teacher).resolve().name}),
    }
    return json.loads(json.dumps(described))  # tuples as the lists that a file gives back


def record_run(folder: Path, described: dict) -> None:
    with writing(folder / RECIPE):
        write_whole(folder / RECIPE, json.dumps(described, indent=2) + "\n")


def check_same_run(folder: Path, described: dict) -> None:
    """Refuse to go on, under other settings, with the run in ``folder``, naming each that differs.

    A result made of two recipes would be neither's.
    """
    if not (folder / RECIPE).exists():
        return  # interrupted before it began
    recorded = _read_json(folder / RECIPE)
    was, now = dict(recorded.get("recipe", {})), described["recipe"]
    changed = [
        f"--{name.replace('_', '-')} {now[name]} (it began with {was[name]})"
        for name in now
        if name in was and was[name] != now[name]
    ]
    if recorded.get("model") != described["model"]:
        changed.append(f"--model {described['model']} (it began with {recorded.get('model')})")
    if recorded.get("teacher") != described.get("teacher"):
        changed.append(f"teacher {described.get('teacher')} (it began with {recorded.get('teacher')})")
    if "rows" in recorded and recorded["rows"] != described["rows"]:
        changed.append("--train with other rows")
    elif recorded.get("task") != described["task"]:
        task = recorded.get("task") or {}
        changed.append(f"--task {described['task']['name']} (it began with {task.get('name')})")
    if recorded.get("processes", 1) != described["processes"]:
        count = recorded.get("processes", 1)
        changed.append(f"{described['processes']} processes (it began with {count})")
    if changed:
        raise InputError(f"resume: expected the settings of the run in {folder}, got {', '.join(changed)}")


def write_static(folder: Path, static: StaticPath) -> None:
    with writing(folder / STATIC):
        write_whole(folder / STATIC, json.dumps(static.options()["paths"]) + "\n")


def read_static(folder: Path) -> StaticPath:
    """The best fixed subsets in ``static.json``."""
    path = folder / STATIC
    try:
        return StaticPath({int(size): layers for size, layers in _read_json(path).items()})
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"checkpoint: expected layers by size in {path}, got {error}") from error


def write_rivals(folder: Path, rivals: dict[str, ConfidenceExit]) -> None:
    """What other ways of leaving would do with the same exits, by name; the exits are the planner's."""
    tables = {name: {**policy.options(), "type": type(policy).__name__} for name, policy in rivals.items()}
    for table in tables.values():
        del table["planner"]
    with writing(folder / RIVALS):
        write_whole(folder / RIVALS, json.dumps(tables) + "\n")


def read_rivals(folder: Path, exits: Exits) -> dict[str, ConfidenceExit]:
    """Other ways of leaving at a planner's exits, calibrated on the same rows.

    Args:
        folder: that ``finetune`` wrote.
        exits: the planner's.

    Returns:
        The policies in ``rivals.json``, by name.

    Raises:
        InputError: no such file, or a damaged one.
    """
    path, rivals = Path(folder) / RIVALS, {}
    try:
        for name, table in _read_json(path).items():
            kind = Policy.registry[table.pop("type")]
            if not issubclass(kind, ConfidenceExit):
                raise ValueError(f"{kind.__name__} has no exits")
            rivals[name] = kind(exits, **table)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"checkpoint: expected policies with exits in {path}, got {error}") from error
    return rivals


def load_run(folder: str | Path) -> tuple[Task, dict, dict[int, tuple[int, ...]]]:
    """What a folder that ``finetune`` wrote says about its run.

    Args:
        folder: of the run.

    Returns:
        Task, recipe settings, and best fixed paths, size -> layers; none of these where nothing was searched
            for.

    Raises:
        InputError: not such a folder, or a damaged one.
    """
    folder = Path(folder)
    described = _read_json(folder / RECIPE)
    try:
        task = Task(**{**described["task"], "labels": tuple(described["task"]["labels"])})
        Recipe(**{**described["recipe"], **_tuples(described["recipe"])})
        if task.name not in TASK_NAMES or task.kind not in ("classification", "regression"):
            raise ValueError(f"task {task.name!r}, {task.kind!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"checkpoint: expected task and recipe in {folder / RECIPE}, got {type(error).__name__}: {error}"
        ) from error
    searched = described["recipe"].get("planner") not in ("exits", "none")
    return task, described["recipe"], read_static(folder).paths if searched else {}


def _tuples(recipe: dict) -> dict:
    return {name: tuple(recipe[name]) for name in ("budgets", "shares") if name in recipe}


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            "checkpoint: expected a folder written by `dynplan finetune`, "
            f"got {path.parent} without {path.name}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"checkpoint: expected {path} to be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"checkpoint: expected {path} to be a JSON object, got {type(value).__name__}")
    return value
