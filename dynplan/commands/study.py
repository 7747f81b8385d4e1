"""``dynplan study``: planners with exits against their rivals, on GLUE's tasks."""

from pathlib import Path
from typing import Annotated

import typer

from dynplan.commands.options import Threads, need
from dynplan.errors import InputError, WriteError

NAME = "study"


def command(
    data: Annotated[
        Path | None, typer.Option(help="Folder with one for each task, which hold files train and dev.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pretrained encoder with its tokenizer.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for runs and results; what is finished stays.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Train nothing: results.json of a study, to write --report from."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Markdown to write, with pictures in the folder of its name.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="GLUE's names, comma-separated.")
    ] = "sst2,cola,mrpc,rte,stsb,qnli",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each task.")] = 1,
    one_seed: Annotated[
        str | None, typer.Option(help="Tasks that get one seed alone.", show_default="none")
    ] = None,
    own_tasks: Annotated[
        str | None,
        typer.Option(help="Tasks with models trained for themselves beside.", show_default="all"),
    ] = None,
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
    if report is not None:
        need("demo", "matplotlib")
    if results is not None:
        if report is None or data is not None or model is not None or output is not None:
            raise InputError("study: expected --report and no --data, --model or --output with --results")
        from dynplan.training.study_report import read_results

        _report(read_results(results), results, report)
        return
    for name, value in (("data", data), ("model", model), ("output", output)):
        if value is None:
            raise InputError(f"study: expected --{name}, got none (or --results and --report)")
    from dynplan.commands.common import parse_budgets, set_threads
    from dynplan.loading import quiet
    from dynplan.training import Recipe
    from dynplan.training.ranks import processes
    from dynplan.training.study import Study, run_study
    from dynplan.training.study_report import report_lines

    wanted, single = _tasks("--tasks", tasks), _tasks("--one-seed", one_seed)
    own = None if own_tasks is None else _tasks("--own-tasks", own_tasks)
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
        single,
        parse_budgets(budgets),
        train_rows=train_rows,
        recipe=recipe,
        own_tasks=own,
        seconds=seconds,
    )
    try:
        found = run_study(study)
    except WriteError as error:
        raise InputError(f"{error}; with room made, the same command goes on") from error
    if processes().is_main_process:
        typer.echo("\n".join(report_lines(found)))
        if report is not None:
            _report(found, output / "results.json", report)


def _tasks(option: str, names: str | None) -> tuple[str, ...]:
    from dynplan.training.study import GLUE

    wanted = tuple(name.strip() for name in names.split(",")) if names else ()
    for name in wanted:
        if name not in GLUE:
            raise InputError(f"{option}: expected some of {', '.join(GLUE)}, got {name!r}")
    return wanted


def _report(found: dict, source: Path, place: Path) -> None:
    from dynplan.training.study_report import link, write_study_report

    command = f"dynplan study --results {source} --report {place}"
    write_study_report(found | {"source": link(source, place)}, place, command)
    typer.echo(f"report: {place}")
