"""Pictures of a study: score against measured time, and who took how many layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynplan.training.pictures import LOOK, pyplot_without_screen, save_picture
from dynplan.training.study_sums import ALL, BATCHES, ORDINARY, scores_by_task, times_by_task

_LOOK = {**LOOK, ORDINARY: ("#000000", "P")}
_ORDINARY_LINE = {"color": "#000000", "linestyle": ":", "linewidth": 1.2}


def _legend(figure, axis) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)


def _tidy(axis, title: str, across: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(across)
    axis.grid(color="#DDDDDD", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _curves(axis, points: dict[str, list[tuple[float, float]]]) -> None:
    """A line for each policy, from (time, score)."""
    for name, (colour, marker) in _LOOK.items():
        own = sorted(points.get(name, ()))
        if own:
            planner = name == "planner"
            axis.plot(
                *zip(*own, strict=True),
                color=colour,
                marker=marker,
                linewidth=2 if planner else 1,
                markersize=6 if planner else 5,
                zorder=3 if planner else 2,
                label=name,
            )


def draw_scores(results: dict, place: Path) -> None:
    """Mean over the tasks: score against the share of keep-all's time, a panel a batch size."""
    plt, tasks = pyplot_without_screen(), results["tasks"]
    scores, times = scores_by_task(results), times_by_task(results)
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.6), sharey=True, layout="constrained")
    for axis, batch in zip(axes, BATCHES, strict=True):
        points: dict[str, list] = {}
        whole = times.get((ALL, None, batch), {})
        for (name, budget, of), own in scores.items():
            taken = times.get((name, budget, of), {})
            if of == batch and len(own) == len(tasks) and len(taken) == len(tasks):
                share = float(np.mean([taken[task] / whole[task] for task in tasks]))
                if name != "Hugging Face (sdpa)":  # several times as long
                    points.setdefault(name, []).append((share, 100 * float(np.mean(list(own.values())))))
        _curves(axis, points)
        for _, score in points.get(ORDINARY, ()):
            axis.axhline(score, **_ORDINARY_LINE)
        _tidy(axis, f"batch {batch}" + (", stream" if batch == 1 else ""), "measured time, of keep-all's")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("mean score of the tasks, of 100")
    _legend(figure, axes[0])
    save_picture(figure, place)
    plt.close(figure)


def draw_task_scores(results: dict, place: Path) -> None:
    """Score against milliseconds: a row a task, a column a batch size."""
    plt, tasks = pyplot_without_screen(), results["tasks"]
    scores, times = scores_by_task(results), times_by_task(results)
    size = (10.4, 1.2 + 2.9 * len(tasks))
    figure, axes = plt.subplots(len(tasks), 2, figsize=size, layout="constrained", squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, batch in zip(row, BATCHES, strict=True):
            points: dict[str, list] = {}
            for (name, budget, of), own in scores.items():
                taken = times.get((name, budget, of), {})
                if of == batch and task in own and task in taken and name != "Hugging Face (sdpa)":
                    points.setdefault(name, []).append((taken[task], 100 * own[task]))
            _curves(axis, points)
            stream = ", stream" if batch == 1 else ""
            _tidy(axis, f"{task}, batch {batch}{stream}", "milliseconds per sample (median)")
            axis.set_xlim(left=0)
        row[0].set_ylabel(results["metrics"][task])
    _legend(figure, axes[0][0])
    save_picture(figure, place)
    plt.close(figure)


def draw_depths(results: dict, place: Path) -> None:
    """Share of the samples that stop after so many layers: a bar a task, a panel a budget."""
    plt, tasks = pyplot_without_screen(), results["tasks"]
    budgets = [budget for budget in results["budgets"] if budget < 1]
    layers = sorted({int(depth) for row in results["depths"] for depth in row["share"]})
    colours = dict(zip(layers, plt.get_cmap("viridis")(np.linspace(0.95, 0.1, len(layers))), strict=True))
    size = (1.2 + 3.2 * len(budgets), 1.8 + 0.35 * len(tasks) * len(BATCHES))
    figure, axes = plt.subplots(
        1, len(budgets), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    lines = [(task, batch) for task in tasks for batch in BATCHES]
    found = {(row["task"], row["budget"], row["batch"]): row["share"] for row in results["depths"]}
    for axis, budget in zip(axes[0], budgets, strict=True):
        start = np.zeros(len(lines))
        for depth in layers:
            shares = np.array([found[task, budget, batch].get(str(depth), 0) for task, batch in lines])
            axis.barh(range(len(lines)), shares, left=start, color=colours[depth], label=f"{depth} layers")
            start += shares
        axis.set_title(f"budget {budget:g}", loc="left", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0][0].set_yticks(range(len(lines)), [f"{task}, batch {batch}" for task, batch in lines])
    axes[0][0].invert_yaxis()
    _legend(figure, axes[0][0])
    save_picture(figure, place)
    plt.close(figure)


def draw_paths_taken(results: dict, place: Path) -> None:
    """Mean layers taken in fifths of the rows, from short to long and from unsure to sure."""
    plt, tasks = pyplot_without_screen(), results["tasks"]
    budgets = [budget for budget in results["budgets"] if budget < 1]
    colours = dict(zip(tasks, plt.get_cmap("tab10").colors, strict=False))
    kinds = {"lengths": "fifths by length, shortest first", "sureness": "fifths by the first exit's sureness"}
    figure, axes = plt.subplots(
        len(budgets),
        2,
        figsize=(9, 1 + 2.6 * len(budgets)),
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for row, budget in zip(axes, budgets, strict=True):
        for axis, (by, title) in zip(row, kinds.items(), strict=True):
            for found in results["paths"]:
                if found["budget"] == budget and found["by"] == by:
                    places = range(1, len(found["layers"]) + 1)
                    task = found["task"]
                    axis.plot(places, found["layers"], marker="o", color=colours[task], label=task)
            _tidy(axis, f"budget {budget:g}", title)
            axis.set_xticks(range(1, 6))
        row[0].set_ylabel("layers taken, mean")
    _legend(figure, axes[0][0])
    save_picture(figure, place)
    plt.close(figure)
