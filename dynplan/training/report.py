"""The report folder: report.md, paths.png, tradeoff.png, results.json; and the same table for a terminal."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from dynplan.benchmarking import environment
from dynplan.files import write_whole
from dynplan.training.data import Task
from dynplan.training.evaluate import Row
from dynplan.training.pictures import draw_paths, draw_tradeoff

_FIXED = ("best fixed subset", "fixed depth")


def columns(task: Task, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results table, as strings.

    layers: share of sample-layers run; work: share of token-layers; ms: milliseconds per sentence. Where a
    stream's budget was tried, the figure that ranks and the layers run one text at a time.
    """
    figures = [name for name in rows[0].figures if name != "score"]
    ranked = task.metric.split("+")
    figures = [name for name in ranked if name in figures]
    sizes = list(rows[0].latency_ms)
    streams = any(row.stream_score is not None for row in rows)
    header = ["policy", "budget", *figures, "layers", "work"]
    header += [f"{task.metric}, stream", "layers, stream"] if streams else []
    header += [f"ms, batch {size}" for size in sizes]
    cells = []
    for row in rows:
        spread = f" ±{row.spread:.3f}" if row.spread and len(figures) == 1 else ""
        cells.append(
            [
                row.name,
                "" if row.budget is None else f"{row.budget:g}",
                *(f"{row.figures[name]:.3f}{spread}" for name in figures),
                f"{row.sample_layers:.0%}",
                f"{row.token_layers:.0%}",
                *(_stream_cells(row) if streams else ()),
                *(f"{row.latency_ms[size]:.2f}" if row.latency_ms else "" for size in sizes),
            ]
        )
    return header, cells


def _stream_cells(row: Row) -> tuple[str, str]:
    if row.stream_score is None:
        return "", ""
    return f"{row.stream_score:.3f}", f"{row.stream_layers:.0%}"


def rich_table(task: Task, rows: list[Row], title: str) -> Table:
    """The results table for a terminal.

    Args:
        task: what was predicted.
        rows: of :func:`evaluate`, at least one.
        title: of the table.

    Returns:
        A table for ``rich``.

    Raises:
        IndexError: no rows.
    """
    header, cells = columns(task, rows)
    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*line, style="bold" if row.name == "planner" else None)
    return table


def markdown_table(task: Task, rows: list[Row]) -> str:
    header, cells = columns(task, rows)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(task: Task, rows: list[Row], samples: int) -> list[str]:
    """Whether the planner beats the best fixed subset, or fixed depths where it has exits, said plainly
    either way.

    A difference within one standard error of the score is called a tie.

    Args:
        task: what was predicted.
        rows: of :func:`evaluate`.
        samples: rows that were scored; the standard error follows from it.

    Returns:
        One sentence per budget.

    Raises:
        TypeError: a planner's row without ``rival_score``.
    """
    fixed = {row.budget: row.name for row in rows if row.name in _FIXED}
    sentences = []
    for row in rows:
        if row.name != "planner" or row.budget not in fixed:
            continue
        score, rival = row.figures["score"], row.rival_score
        margin = _standard_error(task, score, samples)
        name = f"the {fixed[row.budget]}"
        if score - rival > margin:
            words = f"beats {name}"
        elif rival - score > margin:
            words = f"does NOT beat {name}: it is worse"
        else:
            words = f"does NOT beat {name}: the difference is within the noise"
        sentences.append(
            f"At budget {row.budget:g} the planner {words} "
            f"({task.metric} {score:.3f} against {rival:.3f} at the same {row.sample_layers:.0%} of layers, "
            f"{samples} samples, standard error about {margin:.3f})."
        )
    return sentences


def _standard_error(task: Task, score: float, samples: int) -> float:
    if any(name in task.metric for name in ("matthews", "pearson", "spearman")):
        return (1 - score**2) / samples**0.5  # of a correlation
    return max(score * (1 - score), 0.01) ** 0.5 / samples**0.5  # of a proportion


def write_report(
    folder: Path,
    title: str,
    intro: str,
    task: Task,
    rows: list[Row],
    samples: int,
    plans: dict,
    lengths: np.ndarray,
    facts: dict,
) -> Path:
    """Write the report folder: ``report.md``, ``results.json`` and the pictures.

    Args:
        folder: made where it is missing.
        title: of the report.
        intro: its first paragraph.
        task: what was predicted.
        rows: of :func:`evaluate`, at least one.
        samples: rows that were scored.
        plans: budget -> bool ``(N, L)``, the planner's, see :func:`planner_plans`.
        lengths: tokens of each row, int ``(N,)``.
        facts: JSON values that go into ``results.json`` beside the rows and the machine.

    Returns:
        The path of ``report.md``.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    timed = bool(rows[0].latency_ms)
    pictures = []
    for budget, plan in plans.items():
        name = "paths.png" if not pictures else f"paths-{budget:g}.png"
        draw_paths(plan, lengths, budget, folder / name)
        pictures.append(f"![Paths at budget {budget:g}]({name})")
    if timed:
        draw_tradeoff(task, rows, folder / "tradeoff.png")
    else:
        (folder / "tradeoff.png").unlink(missing_ok=True)  # of an earlier report
    words = verdict(task, rows, samples)
    where = environment()
    latency = (
        f"Latency: medians, contestants timed in turn, on {where['device']} ({where['isa']}),"
        f" {where['threads']} threads, torch {where['torch']}, float32 unless said;"
        " the forward alone, not tokenizing."
    )
    text = [
        f"# {title}",
        intro,
        markdown_table(task, rows),
        "layers: share of sample-layers run; work: share of token-layers"
        + ("; ms: milliseconds per sentence." if timed else "; latency was not measured."),
        *([latency] if timed else []),
        "Random paths: mean and standard deviation over three seeds."
        if any(row.name == "random path" for row in rows)
        else "Stream: one text at a time under a StreamBudget of that share, with which batch 1 is timed.",
        "## Does the planner pay?",
        "\n".join(f"- {sentence}" for sentence in words),
        *(["## Score against time", "![Score against measured latency](tradeoff.png)"] if timed else []),
        "## Who took which layers",
        *pictures,
    ]
    write_whole(folder / "report.md", "\n\n".join(text) + "\n")
    results = {
        "title": title,
        "task": asdict(task),
        "samples": samples,
        "machine": where,
        "verdict": words,
        "rows": [asdict(row) for row in rows],
        **facts,
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return folder / "report.md"
