"""``dynplan finetune``: plain, robust, static and planner stages on labelled sentences."""

from pathlib import Path
from typing import Annotated

import typer

from dynplan.commands.options import FILES, Label, Text, TextPair, Threads, need, read
from dynplan.errors import InputError, WriteError

NAME = "finetune"


def command(
    model: Annotated[
        Path, typer.Option(help="Folder of a Hugging Face BERT-family model with its tokenizer.")
    ],
    train: Annotated[Path, typer.Option(help=f"Training rows: {FILES}")],
    output: Annotated[Path, typer.Option(help="Folder for the model, its planner, logs and checkpoints.")],
    evaluation: Annotated[Path | None, typer.Option("--eval", help="Rows to score the result on.")] = None,
    text: Text = "sentence1",
    text_pair: TextPair = None,
    label: Label = "label",
    task: Annotated[
        str, typer.Option(help="auto, classification, regression or a GLUE name (its own figures).")
    ] = "auto",
    plain_epochs: Annotated[float, typer.Option(help="Epochs of ordinary fine-tuning first.")] = 0.0,
    exit_epochs: Annotated[float, typer.Option(help="Epochs with exits on the way.")] = 3.0,
    robust_epochs: Annotated[
        float, typer.Option(help="Epochs with a random path per sample beside the full one; not for exits.")
    ] = 3.0,
    planner_epochs: Annotated[
        float, typer.Option(help="Epochs of planner learning; 0: best fixed subset only.")
    ] = 3.0,
    planner: Annotated[
        str, typer.Option(help="exits, upfront or stepwise; none: ordinary fine-tuning.")
    ] = "exits",
    planner_objective: Annotated[
        str | None,
        typer.Option(help="gates, reward or values.", show_default="values; gates if stepwise"),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Budgets to prepare for, comma-separated.")] = "0.75,0.5",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    exit_learning_rate: Annotated[float, typer.Option(help="Of the exits' heads.")] = 1e-3,
    robust_learning_rate: Annotated[float | None, typer.Option(show_default="--learning-rate")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens; longer rows are cut.")] = 128,
    planner_rows: Annotated[int, typer.Option(min=1, help="Training rows the planner learns from.")] = 2000,
    search_rows: Annotated[
        int, typer.Option(min=1, help="Held-out training rows that fixed subsets are ranked on.")
    ] = 256,
    search_swaps: Annotated[int, typer.Option(min=0, help="Exchanges tried per size of fixed subset.")] = 16,
    menu_size: Annotated[int, typer.Option(min=2, help="Paths that a values planner chooses from.")] = 12,
    seed: Annotated[int, typer.Option()] = 0,
    bf16: Annotated[
        bool, typer.Option(help="Train under bfloat16 autocast: faster where the processor has it.")
    ] = False,
    threads: Threads = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output, under the same settings.")
    ] = False,
) -> None:
    """Fine-tune an encoder with exits on the way, or so that it stands layer bypass with a planner."""
    need("train", "accelerate", "sklearn", "scipy")
    from dynplan.commands.common import evaluate_folder, parse_budgets, set_threads
    from dynplan.loading import quiet
    from dynplan.training import Recipe, finetune
    from dynplan.training.ranks import processes

    recipe = Recipe(
        plain_epochs=plain_epochs,
        exit_epochs=exit_epochs,
        robust_epochs=robust_epochs,
        planner_epochs=planner_epochs,
        planner=planner,
        planner_objective=planner_objective,
        budgets=parse_budgets(budgets),
        batch_size=batch_size,
        learning_rate=learning_rate,
        exit_learning_rate=exit_learning_rate,
        robust_learning_rate=robust_learning_rate,
        max_length=max_length,
        planner_rows=planner_rows,
        search_rows=search_rows,
        search_swaps=search_swaps,
        menu_size=menu_size,
        seed=seed,
        bf16=bf16,
    )
    quiet()
    set_threads(threads)
    rows = read(train, text, text_pair, label)
    held_out = read(evaluation, text, text_pair, label) if evaluation else None
    if held_out:
        _check_evaluation(evaluation, held_out, rows, task)
    try:
        finetune(model, rows, output, task, recipe, resume=resume)
    except KeyboardInterrupt as stop:
        started = (output / "recipe.json").exists()
        typer.echo(
            "interrupted; the same command with --resume goes on from the last checkpoint"
            if started
            else "interrupted before anything was trained",
            err=True,
        )
        raise typer.Exit(130) from stop
    except WriteError as error:
        raise InputError(f"{error}; with room made, the same command with --resume goes on") from error
    scored = planner == "exits" or (planner != "none" and planner_epochs > 0)
    if held_out and scored and processes().is_main_process:
        evaluate_folder(output, held_out, f"{output.name} on {evaluation.name}", recipe.budgets, seconds=0)


def _check_evaluation(place: Path, held_out: list[dict], rows: list[dict], task: str) -> None:
    """What would be told after hours of training is told before."""
    from dynplan.training import encode_labels, infer_task

    try:
        encode_labels(held_out, infer_task(rows, task))
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if (rows[0]["sentence2"] is None) != (held_out[0]["sentence2"] is None):
        raise InputError(f"{place}: expected a second sentence in its rows if and only if --train has one")
