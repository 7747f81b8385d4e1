"""Pictures of a report: who took which layers, and score against time."""

import io
from pathlib import Path

import numpy as np

from dynplan.files import write_whole
from dynplan.training.data import Task
from dynplan.training.evaluate import Row

# Okabe and Ito's colours, told apart with any common colour vision; markers differ as well.
LOOK = {
    "Hugging Face (sdpa)": ("#000000", "s"),
    "dynplan keep-all": ("#0072B2", "D"),
    "planner": ("#D55E00", "o"),
    "random path": ("#999999", "v"),
    "best fixed subset": ("#009E73", "^"),
    "fixed depth": ("#009E73", "^"),
    "entropy exit": ("#CC79A7", "v"),
    "patience exit": ("#56B4E9", "<"),
    "learned exit": ("#E69F00", ">"),
    "hash exit": ("#999999", "x"),
    "random exit": ("#999999", "+"),
    "prefix trained for itself": ("#0072B2", "s"),
    "distilled student": ("#000000", "*"),
    "dynplan keep-all, int8": ("#56B4E9", "D"),
    "planner, int8": ("#E69F00", "o"),
    "dynplan keep-all, bfloat16": ("#56B4E9", "X"),
    "planner, bfloat16": ("#E69F00", "P"),
}
_DPI = 160


def pyplot_without_screen():
    # Imported here: training needs no pictures, and the backend must be chosen before pyplot is.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, place: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=_DPI)
    write_whole(place, picture.getvalue())


def draw_paths(plan: np.ndarray, lengths: np.ndarray, budget: float, place: Path, samples: int = 120) -> None:
    """Which samples took which layers: one column a sample, ordered by path, and each layer's share beside
    it.

    plan: bool ``(N, L)``; lengths: tokens ``(N,)``.
    """
    plt = pyplot_without_screen()
    plan, lengths = plan[:samples], lengths[:samples]
    order = np.lexsort((lengths, *plan.T, plan.sum(1)))
    plan = plan[order]
    layers = plan.shape[1]
    figure, (main, side) = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.32 * layers), width_ratios=(6, 1), sharey=True, layout="constrained"
    )
    colours = np.where(plan.T[..., None], (0.0, 0.447, 0.698), (0.93, 0.93, 0.93))
    main.imshow(colours, aspect="auto", origin="lower", interpolation="nearest")
    main.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
    main.set_xlabel(f"{len(plan)} sentences, ordered by path")
    distinct = len(np.unique(plan, axis=0))
    paths = "one path for all" if distinct == 1 else f"{distinct} different paths"
    main.set_title(f"Budget {budget:g}: {paths}, {plan.mean():.0%} of layers run", loc="left")
    main.set_yticks(np.arange(layers) - 0.5, minor=True)
    main.grid(axis="y", which="minor", color="white", linewidth=2)
    side.barh(range(layers), plan.mean(0), color="#0072B2")
    side.set_xlim(0, 1)
    side.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
    side.set_title("kept by", loc="left")
    for axis in (main, side):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", which="both", length=0)
    save_picture(figure, place)
    plt.close(figure)


def draw_tradeoff(task: Task, rows: list[Row], place: Path) -> None:
    """Score against measured milliseconds per sentence, one panel a batch size."""
    plt, sizes = pyplot_without_screen(), list(rows[0].latency_ms)
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(5.2 * len(sizes), 4.2), sharey=True, layout="constrained", squeeze=False
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        for name, (colour, marker) in LOOK.items():
            own = sorted((row for row in rows if row.name == name), key=lambda row: row.latency_ms[size])
            if not own:
                continue
            alone = size == "1"
            points = [
                (
                    row.latency_ms[size],
                    row.stream_score if alone and row.stream_score is not None else row.figures["score"],
                )
                for row in own
            ]
            line = "-" if len(points) > 1 else "none"
            axis.errorbar(
                *zip(*points, strict=True),
                yerr=[row.spread for row in own] if any(r.spread for r in own) else None,
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=8,
                linewidth=1.8,
                capsize=3,
                label=name,
            )
            if name == "planner":
                for row, point in zip(own, points, strict=True):
                    axis.annotate(
                        f"{row.budget:g}",
                        point,
                        xytext=(7, -11),
                        textcoords="offset points",
                        fontsize=9,
                        color=colour,
                    )
        axis.set_xlim(left=0)
        axis.set_xlabel("milliseconds per sentence (median)")
        axis.set_title(f"batch {size}", loc="left")
        axis.grid(color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(task.metric)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    save_picture(figure, place)
    plt.close(figure)
