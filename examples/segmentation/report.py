"""Tables of a study, as Markdown: mean and standard deviation over seeds, differences paired by seed."""

import statistics
from collections.abc import Callable, Iterable

import numpy as np

from .train import LossOptions, describe

Row = dict


def by_loss(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by the name of their loss, in order of first appearance, seeds ascending."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(describe(LossOptions(**row["loss"])), []).append(row)
    return {name: sorted(group, key=lambda row: row["seed"]) for name, group in groups.items()}


def miou(row: Row) -> float:
    return 100 * row["scores"]["miou"]


SCORES: dict[str, Callable[[Row], float]] = {
    "mIoU": miou,
    "boundary F": lambda row: 100 * row["scores"]["boundary_f"],
    "pixel accuracy": lambda row: 100 * row["scores"]["pixel_accuracy"],
    "mIoU, full resolution": lambda row: 100 * row["full_resolution_scores"]["miou"],
}


def paired(rows: list[Row], baseline: list[Row], score: Callable[[Row], float] = miou) -> np.ndarray:
    """Differences to the baseline's run of the same seed; seeds that only one of them has are left out."""
    reference = {row["seed"]: score(row) for row in baseline}
    return np.array([score(row) - reference[row["seed"]] for row in rows if row["seed"] in reference])


def comparison_table(rows: list[Row], baseline: str) -> str:
    """One line per loss: every score, mIoU minus ``baseline``'s, and how many windows carry the gradient."""
    groups = by_loss(rows)
    header = [
        "loss",
        "seeds",
        *SCORES,
        f"mIoU minus {baseline}",
        "windows with 90 % of the gradient's weight",
    ]
    lines = []
    for name, group in groups.items():
        cells = [name, str(len(group)), *(spread([score(row) for row in group]) for score in SCORES.values())]
        cells.append(
            signed(paired(group, groups[baseline])) if baseline in groups and name != baseline else ""
        )
        cells.append(f"{100 * statistics.mean(row['gradient_concentration'] for row in group):.1f} %")
        lines.append(cells)
    return table(header, lines)


def class_table(rows: list[Row], classes: tuple[str, ...], score: str) -> str:
    """One line per class, one column per loss, of ``iou_per_class`` or ``boundary_f_per_class``."""
    groups = by_loss(rows)
    lines = []
    for index, name in enumerate(classes):
        values = [[row["scores"][score][index] for row in group] for group in groups.values()]
        lines.append([name, *("" if None in v else spread([100 * x for x in v]) for v in values)])
    return table(["class", *groups], lines)


def spread(values: list[float]) -> str:
    """mean ± sample standard deviation; the value alone when there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def signed(differences: np.ndarray) -> str:
    """Mean ± standard deviation of paired differences, and how many are above zero."""
    if len(differences) == 0:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.2f} (n = 1)"
    wins = int((differences > 0).sum())
    spread_of_them = f"{differences.mean():+.2f} ± {differences.std(ddof=1):.2f}"
    return f"{spread_of_them} ({wins} of {len(differences)} seeds above 0)"


def table(header: list[str], lines: list[list[str]]) -> str:
    bar = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, bar, *lines])
