"""``dynplan study``: planners with exits against their rivals, on GLUE's tasks."""

from pathlib import Path
from typing import Annotated

import typer

from dynplan.commands.options import Threads, need
from dynplan.errors import InputError, WriteError

NAME = "study"


def command(
    data: Annotated[
        Path, typer.Option(help="Folder with one for each task, which hold files train and dev.")
    ],
    model: Annotated[Path, typer.Option(help="Folder of a pretrained encoder with its tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder for runs and results; what is finished stays.")],
    tasks: Annotated[
        str, typer.Option(help="GLUE's names, comma-separated.")
    ] = "sst2,cola,mrpc,rte,stsb,qnli",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each task.")] = 1,
    budgets: Annotated[str, typer.Option(help="Budgets below 1 to compare at.")] = "0.75,0.5,0.33",
    train_rows: Annotated[int, typer.Option(min=20, help="At most so many of each task's.")] = 8000,
    epochs: Annotated[float, typer.Option(help="Of every training.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens; longer rows are cut.")] = 128,
    seconds: Annotated[float, typer.Option(min=0, help="Spent on measuring time in each part.")] = 60.0,
    threads: Threads = None,
) -> None:
    """Train, evaluate and compare, task by task; the same command goes on with a killed one."""
    need("train", "accelerate", "sklearn", "scipy")
    from dynplan.commands.common import parse_budgets, set_threads
    from dynplan.loading import quiet
    from dynplan.training import Recipe
    from dynplan.training.ranks import processes
    from dynplan.training.study import GLUE, Study, report_lines, run_study

    wanted = tuple(name.strip() for name in tasks.split(","))
    for name in wanted:
        if name not in GLUE:
            raise InputError(f"--tasks: expected some of {', '.join(GLUE)}, got {name!r}")
    recipe = Recipe(
        exit_epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length
    )
    quiet()
    set_threads(threads)
    study = Study(
        data,
        model,
        output,
        wanted,
        tuple(range(seeds)),
        parse_budgets(budgets),
        train_rows,
        recipe,
        seconds=seconds,
    )
    try:
        results = run_study(study)
    except WriteError as error:
        raise InputError(f"{error}; with room made, the same command goes on") from error
    if processes().is_main_process:
        typer.echo("\n".join(report_lines(results)))
