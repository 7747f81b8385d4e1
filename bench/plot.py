"""The chart of the README, from the committed history alone: python bench/plot.py"""

import json
from pathlib import Path
from typing import Annotated

import typer
from compare_cpu import HISTORY
from matplotlib.figure import Figure

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "cpu_engines.png"


_COLUMNS = 3
_COLOURS = {"dynplan": "tab:blue", "dynplan-int8": "tab:cyan", "dynplan-bf16": "tab:purple"}


def latest(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Per case (model, lengths, batch) the rows of its latest run, native instruction set only.

    A row during which other processes had more than a quarter of the processors is left out: it says
    nothing. So is a case without any other row.
    """
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["isa_limit"] != "native":
            continue
        known = cases.setdefault((row["model"], row["lengths"], row["batch"]), [])
        if known and known[0]["time"] != row["time"]:
            known.clear()
        if row["foreign"] <= 0.25:
            known.append(row)
    return {case: known for case, known in cases.items() if known}


def draw(cases: dict[tuple, list[dict]], path: Path) -> None:
    """A panel per case, most bars first: sentences per second by engine and order, dynplan in colour."""
    ordered = sorted(cases.items(), key=lambda case: -len(case[1]))
    heights = [2 + len(rows) for _, rows in ordered[::_COLUMNS]]
    figure = Figure(figsize=(6 * _COLUMNS, 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(heights), _COLUMNS, squeeze=False, gridspec_kw={"height_ratios": heights}
    ).flatten()
    for axes in panels[len(ordered) :]:
        axes.set_visible(False)
    for axes, ((model, lengths, batch), rows) in zip(panels, ordered, strict=False):
        names = [_label(row) for row in rows]
        rates = [row["sentences"] / row["p50"] for row in rows]
        colours = [_COLOURS.get(row["engine"], "0.7") for row in rows]
        axes.bar_label(axes.barh(names, rates, color=colours), [f"{rate:.0f}" for rate in rates], padding=3)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * max(rates))
        kind = "sentences" if lengths == "sentences" else f"{lengths} tokens"
        axes.set_title(f"{model}, batch {batch}, {kind}, {rows[0]['threads']} threads", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("sentences per second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _label(row: dict) -> str:
    if row["engine"].startswith("dynplan"):
        kept = "all layers" if row["share"] == 1 else f"{row['share']:g} of the layers"
        return f"{row['engine']}, {kept}"
    return f"{row['engine']}, sorted" if row["order"] == "sorted" else row["engine"]


def main(
    history: Annotated[Path, typer.Option(help="Written by compare_cpu.py.")] = HISTORY,
    image: Annotated[Path, typer.Option(help="PNG to write.")] = IMAGE,
) -> None:
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    draw(latest(rows), image)


if __name__ == "__main__":
    typer.run(main)
