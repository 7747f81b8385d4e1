"""``python -m examples.serving``: prepare a model, serve it, or test it under load."""

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Model = Annotated[Path, typer.Option(help="Folder that `prepare` or `dynplan finetune` wrote.")]
Threads = Annotated[int, typer.Option(min=1, help="Processor threads of the model.")]


@app.command()
def prepare(
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    rows: Annotated[int, typer.Option(min=100, help="Film reviews to learn from.")] = 2000,
) -> None:
    """Fine-tune a small encoder on film reviews, with its planner: minutes on two cores."""
    from examples.serving.model import prepare

    prepare(output, rows)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    budget: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of all batches.", show_default="follows the queue")
    ] = None,
    floor: Annotated[float, typer.Option(min=0.01, max=1, help="Budget under load.")] = 0.5,
    swapped: Annotated[bool, typer.Option("--swapped/--unswapped", help="Or the unmodified model.")] = True,
    threads: Threads = 1,
) -> None:
    """Serve the model until it is told to stop; what waits then is answered first."""
    import uvicorn

    from examples.serving.app import make_app
    from examples.serving.batcher import Limits
    from examples.serving.model import Runner

    torch.set_num_threads(threads)
    uvicorn.run(
        make_app(Runner(model, swapped), Limits(floor=floor), budget),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=30,
    )


@app.command()
def load(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for results.json and load.png.")] = Path(
        "serving-load"
    ),
    seconds: Annotated[float, typer.Option(min=0.5, max=120, help="Of each load.")] = 8.0,
    floor: Annotated[
        float, typer.Option(min=0.01, max=1, help="Fixed budget, and the moving one's floor.")
    ] = 0.5,
    threads: Threads = 1,
) -> None:
    """Moving budget, fixed budget and unmodified model, each at three loads, in one run."""
    from examples.serving.load_test import run_load_test

    run_load_test(model, output, seconds, floor, threads)


if __name__ == "__main__":
    app()
