"""Pictures of a study: masks side by side, curves, and scores as points."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from torch import Tensor

from .data import Classes, Split

COLOURS = ("#4c5b6b", "#d1495b", "#2a7fba", "#e6a23c", "#5b8c5a")


def write_masks(path: Path, split: Split, predictions: dict[str, Tensor], classes: Classes) -> None:
    """One row per sample: image, labels, then each prediction. Void pixels are painted as void in all.

    The picture shows the data set, so its licence is the data set's.
    """
    columns = {"image": None, "labels": split.labels, **predictions}
    rows = len(split.names)
    height, width = split.labels.shape[1:]
    figure, axes = plt.subplots(
        rows,
        len(columns),
        figsize=(2.4 * len(columns), 2.4 * rows * height / width + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for row in range(rows):
        for column, (title, labels) in enumerate(columns.items()):
            axis = axes[row, column]
            if labels is None:
                axis.imshow(split.images[row].permute(1, 2, 0).numpy())
            else:
                shown = np.where(split.labels[row] == classes.ignore_id, classes.ignore_id, labels[row])
                axis.imshow(classes.colours[shown])
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=9)
    names = {*enumerate(classes.names), (classes.ignore_id, "void")}
    patches = [Patch(color=classes.colours[i] / 255, label=name) for i, name in sorted(names)]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(columns) * 2, fontsize=7, frameon=False
    )
    _save(figure, path, dpi=130)


def write_curves(path: Path, rows: dict[str, list[dict]]) -> None:
    """Validation mIoU over the epochs for each loss: the mean over the seeds, and each seed thinly."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, (name, runs) in zip(COLOURS, rows.items(), strict=False):
        epochs = runs[0]["curves"]["epoch"]
        values = np.array([run["curves"]["miou"] for run in runs]) * 100
        for seed in values:
            axis.plot(epochs, seed, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(epochs, values.mean(0), color=colour, label=f"{name} ({len(runs)} seeds)")
    axis.set_xlabel("epoch")
    axis.set_ylabel("mIoU, %")
    axis.legend(fontsize=8, frameon=False)
    _finish(axis)
    _save(figure, path)


def write_differences(path: Path, differences: dict[str, np.ndarray], baseline: str) -> None:
    """Each setting's paired differences to ``baseline`` in points: a dot per seed, a bar for the mean."""
    figure, axis = plt.subplots(figsize=(6, 0.32 * len(differences) + 1), layout="constrained")
    for place, values in enumerate(differences.values()):
        axis.barh(place, values.mean(), color="#2a7fba" if values.mean() >= 0 else "#d1495b", alpha=0.5)
        axis.plot(values, np.full(len(values), place), ".", color="#222222", markersize=4)
    axis.set_yticks(
        range(len(differences)), [f"{n} (n={len(v)})" for n, v in differences.items()], fontsize=8
    )
    axis.invert_yaxis()
    axis.axvline(0, color="#222222", linewidth=0.8)
    axis.set_xlabel(f"mIoU minus that of {baseline}, same seed, points", fontsize=8)
    _finish(axis)
    _save(figure, path)


def _finish(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)


def _save(figure, path: Path, dpi: int = 120) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
