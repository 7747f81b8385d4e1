"""What ``dynplan predict`` and ``dynplan embed`` share."""

import torch
import typer

from dynplan.errors import InputError, WriteError
from dynplan.inference import RunSettings, run
from dynplan.loading import quiet


def run_files(settings: RunSettings, threads: int | None, resume: bool) -> None:
    """Run, and say in a line what became of it."""
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        done = run(settings, resume)
    except KeyboardInterrupt as stop:
        typer.echo("interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(130) from stop
    except WriteError as error:
        raise InputError(f"{error}; with room made, the same command with --resume goes on") from error
    if done is None:
        typer.echo(f"{settings.output} is whole already: nothing to do", err=True)
        return
    rate = done.new / max(done.seconds, 1e-9)
    said = f"{done.rows} rows in {settings.output}; {done.new} of them now, {rate:.0f} rows a second"
    if done.bad:
        said += f"; {done.bad} rows that could not be used in {settings.bad_path}"
    typer.echo(said, err=True)
