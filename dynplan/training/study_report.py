"""A study's report: what was reached, said first and computed from the figures; tables; pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynplan.errors import InputError
from dynplan.files import write_whole, writing
from dynplan.training.study_pictures import draw_depths, draw_paths_taken, draw_scores, draw_task_scores
from dynplan.training.study_sums import (
    ALL,
    BATCHES,
    ORACLE,
    ORDINARY,
    scores_by_task,
    times_by_task,
)

_CLOSE = (0.5, 0.33)  # budgets at which the planner is to be above every rival
_HOW = {32: "batch 32, the contract per batch", 1: "batch 1, the contract over the stream"}


_HOLDS = ("tasks", "seeds", "metrics", "train_rows", "model", "recipe", "machine", "budgets", "parts", "rows",
          "targets", "against_rivals", "depths", "paths")  # fmt: skip


def read_results(place: Path) -> dict:
    """What :func:`~dynplan.training.study.run_study` wrote; raises InputError for another file."""
    try:
        results = json.loads(place.read_bytes())
        missing = [name for name in _HOLDS if name not in results]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--results: expected results.json of a study in {place}, got {error}") from error
    if missing or not results["parts"]:
        lacking = ", ".join(missing) or "finished parts"
        raise InputError(f"--results: expected results.json of a study, got {place} without {lacking}")
    return results


def write_study_report(results: dict, place: Path, command: str) -> None:
    """Write ``place`` (Markdown) from what :func:`~dynplan.training.study_sums.collect` gave, and its
    pictures into the folder beside it that has its name.

    Args:
        results: of the study.
        place: the file.
        command: that makes it again.
    """
    pictures = place.with_suffix("")
    with writing(place):
        pictures.mkdir(parents=True, exist_ok=True)
        drawn = {
            "scores.png": (draw_scores, "Mean score of the tasks against measured time"),
            "tasks.png": (draw_task_scores, "Score against measured milliseconds, task by task"),
            "depths.png": (draw_depths, "Layers taken per task"),
            "paths.png": (draw_paths_taken, "Layers taken against length and confidence"),
        }
        for name, (draw, _) in drawn.items():
            draw(results, pictures / name)
        shown = {name: f"![{title}]({pictures.name}/{name})" for name, (_, title) in drawn.items()}
        write_whole(place, "\n".join(_text(results, shown, command)) + "\n")


def _text(results: dict, shown: dict[str, str], command: str) -> list[str]:
    machine = results["machine"]
    return [
        "# What came out",
        "",
        " ".join(summary(results)),
        "",
        f"Generated from [{results['source']}]({results['source']}) by `{command}`. " + _setting(results),
        "",
        "## Against ordinary fine-tuning",
        "",
        *target_lines(results),
        "",
        "Time: share of keep-all's, measured in the same run. The budget is the largest one whose time is",
        "within the first column. Points: score less the target, of 100; standard error over dev rows",
        "(paired bootstrap) and over seeds.",
        "",
        shown["scores.png"],
        "",
        "## Scores",
        "",
        *score_lines(results),
        "",
        "Each task's own figure, of 100, mean over seeds. Batch 1 is one text at a time under a",
        "StreamBudget. The oracle stops each sample at the first right answer, as far as the budget goes:",
        "a bound, no policy.",
        "",
        "## Against the rivals, at equal measured time",
        "",
        *rival_lines(results),
        "",
        "The planner's score, between its measured budgets, where it takes the rival's own time; all",
        "rivals but prefixes and students use the planner's exits and weights. Points of 100; behind:",
        "tasks on which the rival is ahead by more than a standard error.",
        "",
        shown["tasks.png"],
        "",
        "## Which layers are taken",
        "",
        shown["depths.png"],
        "",
        shown["paths.png"],
        "",
        f"Times: medians, contestants timed in turn, on {machine['device']} ({machine['isa']}), "
        f"{machine['threads']} threads, torch {machine['torch']}, float32; the forward alone, without "
        "tokenizing.",
    ]


def _setting(results: dict) -> str:
    seeds = ", ".join(f"{task} {len(own)}" for task, own in results["seeds"].items())
    rows = ", ".join(f"{task} {count}" for task, count in results["train_rows"].items())
    recipe = results["recipe"]
    return (
        f"Encoder {results['model']}; {recipe['exit_epochs']:g} epochs of every training, batches of "
        f"{recipe['batch_size']}, learning rate {recipe['learning_rate']:g}. Seeds: {seeds}. Training rows: "
        f"{rows}. Scores are of official dev rows, on which nothing was chosen."
    )


def summary(results: dict) -> list[str]:
    """The first paragraph, sentence by sentence: every target, and where the planner is behind."""
    tasks = results["tasks"]
    if not results["targets"]:
        return [f"Nothing was timed yet: {results['parts']} parts are there."]
    sentences = [f"Mean of {len(tasks)} task{'s' if len(tasks) > 1 else ''} ({', '.join(tasks)})."]
    for batch in BATCHES:
        reached = [_reached(target) for target in results["targets"] if target["batch"] == batch]
        sentences.append(f"With {_HOW[batch]}: {'; '.join(reached)}.")
    for batch in BATCHES:
        sentences += _beside_rivals(results, batch)
    return sentences + [_falls(results)]


def _reached(target: dict) -> str:
    wanted = f"{target['share']:.0%} of ordinary fine-tuning's score at {target['time']:.0%} of the time"
    if target["budget"] is None:
        return f"{wanted} could not be tried, since no budget is as fast"
    figures = f"{target['reached']:.1%} at {target['measured_time']:.0%}"
    above = target["above_target"]
    spread = max(above["standard_error"], above["over_seeds"] or 0.0)
    if above["points"] >= 0:
        return f"{wanted} is reached ({figures})"
    if above["points"] >= -spread:
        return f"{wanted} is not reached, but within the noise ({figures})"
    return f"{wanted} is NOT reached ({figures})"


def _beside_rivals(results: dict, batch: int) -> list[str]:
    against = [row for row in results["against_rivals"] if row["batch"] == batch and row["budget"] in _CLOSE]
    if not against:
        return []
    ahead = [row for row in against if row["points"] > 0]
    behind = [row for row in against if row["points"] < 0]
    where = f"At equal measured time, batch {batch}, budgets {' and '.join(f'{b:g}' for b in _CLOSE)}"
    sentences = [f"{where}, the planner is on average above {len(ahead)} of {len(against)} rivals' points."]
    if behind:
        named = [f"{_named(row)} by {_points(row, -1)}" for row in behind]
        sentences.append(f"It is behind {', '.join(named)}.")
    single = [f"{task} {_named(row)} by {_points(own, -1)}" for row in against for task, own in _behind(row)]
    if single:
        sentences.append(f"On single tasks it is behind by more than a standard error: {', '.join(single)}.")
    return sentences


def _named(row: dict) -> str:
    return f"{row['rival']} at {row['budget']:g}"


def _points(row: dict, sign: int = 1) -> str:
    return f"{sign * row['points']:.1f} ±{row['standard_error']:.1f}"


def _behind(row: dict) -> list[tuple[str, dict]]:
    """Tasks on which a rival is ahead by more than a standard error."""
    return [(task, own) for task, own in row["tasks"].items() if own["points"] < -own["standard_error"]]


def _falls(results: dict) -> str:
    """Whether more to spend is ever worse."""
    worst = []
    for batch in BATCHES:
        curve = sorted(
            (budget, np.mean(list(scores.values())))
            for (name, budget, of), scores in scores_by_task(results).items()
            if name == "planner" and of == batch
        )
        drops = [(low[1] - high[1], *low, high[0]) for low, high in zip(curve, curve[1:], strict=False)]
        worst.append((*max(drops, default=(0.0, 0.0, 0.0, 0.0)), batch))
    drop, low, _, high, batch = max(worst)
    if drop <= 0:
        return "The mean score never falls as the budget rises."
    return (
        f"As the budget rises the mean score falls by {100 * drop:.2f} points at most "
        f"(from {low:g} to {high:g}, batch {batch})."
    )


def target_lines(results: dict) -> list[str]:
    lines = _markdown(("time", "target", "batch", "budget", "measured time", "score", "ordinary", "reached",
                       "points above target", "standard error", "over seeds"), 0)  # fmt: skip
    for target in results["targets"]:
        aim = f"{target['time']:.0%}", f"{target['share']:.0%}", target["batch"]
        if target["budget"] is None:
            lines.append(_line((*aim, *[""] * 8)))
            continue
        above = target["above_target"]
        seeds = "" if above["over_seeds"] is None else f"{above['over_seeds']:.2f}"
        lines.append(_line((
            *aim, f"{target['budget']:g}", f"{target['measured_time']:.0%}", f"{target['score']:.2f}",
            f"{target['ordinary']:.2f}", f"{target['reached']:.1%}", f"{above['points']:+.2f}",
            f"{above['standard_error']:.2f}", seeds,
        )))  # fmt: skip
    return lines


def score_lines(results: dict) -> list[str]:
    tasks, times = results["tasks"], times_by_task(results)
    header = [f"{task} ({results['metrics'][task]})" for task in tasks]
    lines = _markdown(("policy", "budget", "batch", *header, "mean", "time"), 1)
    order = {ORDINARY: 0, ALL: 1, "planner": 2, ORACLE: 9}
    table = scores_by_task(results)
    for key in sorted(table, key=lambda key: (-key[2], -(key[1] or 2), order.get(key[0], 5), key[0])):
        (name, budget, batch), scores = key, table[key]
        shown = [f"{100 * scores[task]:.1f}" if task in scores else "" for task in tasks]
        mean = f"{100 * np.mean(list(scores.values())):.1f}" if len(scores) == len(tasks) else ""
        taken, whole = times.get(key, {}), times.get((ALL, None, batch), {})
        share = f"{np.mean([taken[task] / whole[task] for task in taken]):.0%}" if taken else ""
        lines.append(_line((name, "" if budget is None else f"{budget:g}", batch, *shown, mean, share)))
    return lines


def rival_lines(results: dict) -> list[str]:
    lines = _markdown(("rival", "budget", "batch", "its time", "planner above it, points", "standard error",
                       "over seeds", "behind"), 1)  # fmt: skip
    for row in results["against_rivals"]:
        seeds = "" if row["over_seeds"] is None else f"{row['over_seeds']:.2f}"
        behind = ", ".join(f"{task} {_points(own)}" for task, own in _behind(row))
        lines.append(_line((
            row["rival"], f"{row['budget']:g}", row["batch"], f"{row['time']:.0%}",
            f"{row['points']:+.2f}", f"{row['standard_error']:.2f}", seeds, behind,
        )))  # fmt: skip
    return lines


def report_lines(results: dict) -> list[str]:
    """Summary and tables, for a terminal."""
    return [
        *summary(results), "", *target_lines(results), "", *score_lines(results), "", *rival_lines(results)
    ]  # fmt: skip


def link(source: Path, place: Path) -> str:
    """``source`` as a reader of ``place`` finds it."""
    return Path(os.path.relpath(source, place.parent)).as_posix()


def _markdown(header: tuple, words: int) -> list[str]:
    """The first two lines of a table whose first ``words`` columns are words."""
    return [_line(header), _line((":--",) * words + ("--:",) * (len(header) - words))]


def _line(cells: Sequence) -> str:
    return f"| {' | '.join(map(str, cells))} |"
