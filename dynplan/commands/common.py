"""What several commands share."""

from pathlib import Path

import torch
from rich.console import Console

import dynplan
from dynplan.files import writing
from dynplan.loading import load, load_tokenizer
from dynplan.ops.reduced_encoder import REDUCED_DTYPES
from dynplan.training import (
    InputError,
    Row,
    check_tokens,
    encode_rows,
    evaluate,
    load_run,
    plain_model,
    planner_plans,
    read_rivals,
    rich_table,
    verdict,
    write_report,
)


def parse_budgets(text: str) -> tuple[float, ...]:
    """``"0.75,0.5"`` as numbers; raises InputError for anything outside 0..1."""
    budgets = []
    for part in text.split(","):
        try:
            budget = float(part)
        except ValueError:
            budget = -1.0
        if not 0 < budget <= 1:
            raise InputError(f"budgets: expected numbers within 0..1, comma-separated, got {part.strip()!r}")
        budgets.append(budget)
    return tuple(budgets)


def parse_weights(text: str | None) -> tuple[str, ...]:
    """``"int8,bfloat16"`` as names; raises InputError for others."""
    names = tuple(part.strip() for part in text.split(",")) if text else ()
    for name in names:
        if name not in REDUCED_DTYPES:
            raise InputError(
                f"weights: expected {' or '.join(REDUCED_DTYPES)}, comma-separated, got {name!r}"
            )
    return names


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def evaluate_folder(
    folder: Path,
    rows: list[dict],
    title: str,
    budgets: tuple[float, ...],
    *,
    seconds: float,
    beside: Path | None = None,
    report: Path | None = None,
    max_length: int | None = None,
    intro: str = "",
    weights: tuple[str, ...] = (),
) -> list[Row]:
    """Evaluate a folder that ``finetune`` wrote, print table and verdict, write the report if asked."""
    task, recipe, static = load_run(folder)
    model = load("checkpoint", folder, dynplan.from_pretrained)
    plain = plain_model(beside or folder)
    if plain.config.num_labels != task.num_labels:
        raise InputError(
            f"--beside: expected a model of {task.num_labels} labels, got {beside} "
            f"of {plain.config.num_labels}"
        )
    tokenizer = load_tokenizer(folder)
    dataset = encode_rows(rows, task, tokenizer, max_length or recipe["max_length"])
    check_tokens(dataset, tokenizer, model.config)
    results = evaluate(
        model,
        plain,
        static,
        dataset,
        task,
        tokenizer,
        budgets,
        batch_sizes=(1, 32) if seconds else (),
        seconds=seconds,
        weights=weights,
        rivals=read_rivals(folder, model.dynplan.planner) if recipe.get("planner") == "exits" else None,
    )
    console = Console(markup=False, highlight=False)  # titles and labels may hold brackets
    console.print(rich_table(task, results, title))
    for sentence in verdict(task, results, len(dataset)):
        console.print(sentence)
    if report is not None:
        plans, lengths = planner_plans(model, dataset, tokenizer, task, [b for b in budgets if b < 1])
        with writing(report):
            place = write_report(
                report, title, intro, task, results, len(dataset), plans, lengths, {"recipe": recipe}
            )
        console.print(f"report: {place}", soft_wrap=True)
    return results
