"""``dynplan evaluate``: score, share of compute and measured latency per budget."""

from pathlib import Path
from typing import Annotated

import typer

from dynplan.commands.options import FILES, Label, Text, TextPair, Threads, need, read

NAME = "evaluate"


def command(
    model: Annotated[Path, typer.Option(help="Folder that `dynplan finetune` wrote.")],
    evaluation: Annotated[Path, typer.Option("--eval", help=f"Rows to score: {FILES}")],
    budgets: Annotated[str, typer.Option(help="Budgets, comma-separated, within 0..1.")] = "1.0,0.75,0.5",
    beside: Annotated[
        Path | None,
        typer.Option(help="Another model to stand as the unmodified one.", show_default="the same weights"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Also keep-all and planner on weights of these types: int8, bfloat16, or both."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.md, pictures and results.json.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=1e6, help="Time spent on measuring latency; 0: scores only.")
    ] = 40.0,
    max_length: Annotated[
        int | None, typer.Option(min=2, max=2**20, help="Tokens.", show_default="as in training")
    ] = None,
    text: Text = "sentence1",
    text_pair: TextPair = None,
    label: Label = "label",
    threads: Threads = None,
) -> None:
    """Compare planner, random path and best fixed subset at every budget with the unmodified model."""
    need("train", "sklearn", "scipy")
    if report is not None:
        need("demo", "matplotlib")
    from dynplan.commands.common import (
        evaluate_folder,
        parse_budgets,
        parse_weights,
        set_threads,
    )
    from dynplan.loading import quiet
    from dynplan.training import check_output

    quiet()
    set_threads(threads)
    if report is not None:
        check_output(report, resume=True)
    evaluate_folder(
        model,
        read(evaluation, text, text_pair, label),
        f"{model.name} on {evaluation.name}",
        parse_budgets(budgets),
        seconds=seconds,
        beside=beside,
        report=report,
        max_length=max_length,
        weights=parse_weights(weights),
    )
