"""Tables of a study, as Markdown: mean and standard deviation over seeds, differences paired by seed."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from .losses import LossOptions
from .study import CROSS_ENTROPY

Row = dict

SCORES: dict[str, Callable[[Row], float]] = {
    "mIoU": lambda row: 100 * row["scores"]["miou"],
    "boundary F": lambda row: 100 * row["scores"]["boundary_f"],
    "pixel accuracy": lambda row: 100 * row["scores"]["pixel_accuracy"],
    "calibration error": lambda row: 100 * row["scores"]["calibration_error"],
}


def by_loss(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by the name of their loss, in order of first appearance, seeds ascending."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(LossOptions(**row["loss"])), []).append(row)
    return {name: sorted(group, key=lambda row: row["seed"]) for name, group in groups.items()}


def paired(rows: list[Row], baseline: list[Row]) -> np.ndarray:
    """Differences of mIoU to the baseline's run of the same seed; seeds that only one has are left out."""
    miou = SCORES["mIoU"]
    reference = {row["seed"]: miou(row) for row in baseline}
    return np.array([miou(row) - reference[row["seed"]] for row in rows if row["seed"] in reference])


def loss_table(rows: list[Row]) -> str:
    """One line per loss: every score, mIoU minus cross-entropy's, CPU time of a step and its loss, memory."""
    groups = by_loss(rows)
    baseline = groups.get(str(CROSS_ENTROPY), [])
    header = ["loss", "seeds", *SCORES, "mIoU minus cross-entropy", "step, CPU s", "loss, CPU s", "peak, MB"]
    lines = []
    for name, group in groups.items():
        lines.append(
            [name, str(len(group)), *(spread([score(row) for row in group]) for score in SCORES.values())]
        )
        lines[-1].append("" if group is baseline else signed(paired(group, baseline)))
        for key, scale, digits in (
            ("step_cpu_seconds", 1, 2),
            ("loss_cpu_seconds", 1, 3),
            ("peak_bytes", 1e-6, 0),
        ):
            lines[-1].append(f"{scale * statistics.median(row[key] for row in group):.{digits}f}")
    return table(header, lines)


def class_table(rows: list[Row], classes: list[str]) -> str:
    """One line per loss, one column per class, of IoU."""
    lines = []
    for name, group in by_loss(rows).items():
        values = zip(*(row["scores"]["iou_per_class"] for row in group), strict=True)
        lines.append([name, *("" if None in v else f"{100 * statistics.mean(v):.1f}" for v in values)])
    return table(["IoU, %", *classes], lines)


def rate_table(rows: list[Row]) -> str:
    """Cross-entropy's mIoU on the held-out part, by learning rate."""
    found = sorted((row["settings"]["learning_rate"], SCORES["mIoU"](row)) for row in rows)
    return table(["learning rate", "mIoU, held out"], [[f"{rate:g}", f"{miou:.2f}"] for rate, miou in found])


def tables(rows: list[Row]) -> dict[str, str]:
    """Every table of a study by its heading; parts without a run are left out."""
    classes = rows[0]["classes"]
    order = {str(loss): i for i, loss in enumerate(dict.fromkeys(LossOptions(**row["loss"]) for row in rows))}
    found = {}
    epochs = sorted({row["settings"]["epochs"] for row in rows})
    for count in epochs:
        part = [row for row in rows if row["settings"]["epochs"] == count]
        held = [row for row in part if row["hold_out"]]
        plain = [row for row in held if row["loss"]["kind"] == CROSS_ENTROPY.kind]
        scored = sorted(
            (r for r in part if not r["hold_out"]), key=lambda r: order[str(LossOptions(**r["loss"]))]
        )
        if len(plain) > 1:
            found[f"Learning rates of cross-entropy, {count} epochs"] = rate_table(plain)
        if len(held) > len(plain):
            rate = scored[0]["settings"]["learning_rate"] if scored else None
            shown = [row for row in held if rate is None or row["settings"]["learning_rate"] == rate]
            found[f"Held-out part of the training drives, {count} epochs"] = loss_table(shown)
        if scored:
            found[f"Validation frames, {count} epochs"] = loss_table(scored)
            found[f"Validation frames, {count} epochs, by class"] = class_table(scored, classes)
    return found


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(_rounded(row), ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{text}\n]\n")


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
        return f"{differences[0]:+.2f}"
    wins = int((differences > 0).sum())
    spread_of_them = f"{differences.mean():+.2f} ± {differences.std(ddof=1):.2f}"
    return f"{spread_of_them} ({wins} of {len(differences)} seeds above 0)"


def table(header: list[str], lines: list[list[str]]) -> str:
    bar = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, bar, *lines])


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value
