"""A picture of predictions beside the labels."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from torch import Tensor

from .data import Classes, Split


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
