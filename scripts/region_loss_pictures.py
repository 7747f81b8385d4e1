"""The two pictures of docs/region-loss.md: ``python scripts/region_loss_pictures.py docs/images``.

Needs matplotlib. The label map is made up; weights are the op's: they are read off its gradient.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from dynplan.ops import region_cross_entropy

KERNEL = 5
ANCHORS = ((4, 4), (9, 11), (14, 20))  # inside a region, at a boundary, at a corner of three


def label_map() -> torch.Tensor:
    """Ground, an upright object and a slope, 20 x 28."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(28), indexing="ij")
    labels = (rows + columns > 33).long() * 2
    labels[6:18, 8:12] = 1
    return labels


def window_weights(labels: torch.Tensor, anchor: tuple[int, int]) -> torch.Tensor:
    """a_qp of one anchor: how its loss's gradient is shared out over the pixels."""
    logits = torch.zeros(1, 3, *labels.shape, dtype=torch.float64, requires_grad=True)
    losses = region_cross_entropy(logits, labels[None], kernel_size=KERNEL, reduction="none")
    (gradient,) = torch.autograd.grad(losses[0][anchor], logits)
    shares = gradient[0].abs().sum(0)
    return shares / shares.sum()


def draw_windows(path: Path) -> None:
    labels = label_map()
    figure, axes = plt.subplots(1, 1 + len(ANCHORS), figsize=(11, 2.6), layout="constrained")
    colours = matplotlib.colors.ListedColormap(["#d9e2ec", "#f2b5a7", "#b8d8ba"])
    axes[0].imshow(labels, cmap=colours)
    axes[0].set_title("labels, three anchors and their windows", fontsize=9)
    for number, (row, column) in enumerate(ANCHORS, 1):
        reach = KERNEL // 2
        frame = plt.Rectangle((column - reach - 0.5, row - reach - 0.5), KERNEL, KERNEL, fill=False)
        axes[0].add_patch(frame)
        axes[0].text(column, row, str(number), ha="center", va="center", fontsize=8)
        rows, columns = (slice(at - reach, at + reach + 1) for at in (row, column))
        weights = window_weights(labels, (row, column))[rows, columns].numpy()
        axes[number].imshow(labels[rows, columns], cmap=colours, vmin=0, vmax=2)
        for (y, x), weight in np.ndenumerate(weights):
            axes[number].text(
                x, y, f"{100 * weight:.0f}" if weight else "", ha="center", va="center", fontsize=8
            )
        axes[number].set_title(f"{number}: weights of the merged logits, %", fontsize=9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_exponents(path: Path) -> None:
    """The factor (l / L)^(p-1) of a window's gradient, of windows with losses from 0 to 5 evenly."""
    losses = np.linspace(1e-3, 5, 400)
    figure, axis = plt.subplots(figsize=(5.5, 3), layout="constrained")
    for p, colour in zip((1, 2, 3, 5), ("#4c5b6b", "#2a7fba", "#5b8c5a", "#d1495b"), strict=True):
        weights = losses ** (p - 1)
        axis.plot(losses, weights / weights.mean(), color=colour, label=f"p = {p}")
    axis.set_xlabel("loss of a window (probability of its label: exp(-loss))")
    axis.set_ylabel("weight of its gradient,\nmean 1")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    draw_windows(folder / "region_loss_windows.png")
    draw_exponents(folder / "region_loss_exponents.png")
