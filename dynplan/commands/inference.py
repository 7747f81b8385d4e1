"""What ``dynplan predict`` and ``dynplan embed`` share."""

import torch
import typer

from dynplan.commands.options import need
from dynplan.errors import InputError, WriteError
from dynplan.inference import RunSettings, Summary, run
from dynplan.loading import quiet


def run_files(
    settings: RunSettings, threads: int | None, resume: bool, address: str | None, actors: int
) -> None:
    """Run here, or on the Ray cluster at ``address``, and say in a line what became of it."""
    quiet()
    if address is not None:
        _run_on_ray(settings, threads or 1, resume, address, actors)
        return
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
    _say(settings, done)


def _run_on_ray(settings: RunSettings, threads: int, resume: bool, address: str, actors: int) -> None:
    need("ray", "ray")
    from dynplan.inference.on_ray import Cluster, run_on_ray

    if resume:
        raise InputError("--resume: expected no --ray, where Ray has lost work done again, got both")
    _say(settings, run_on_ray(settings, Cluster(address, actors, threads)))


def _say(settings: RunSettings, done: Summary) -> None:
    rate = done.new / max(done.seconds, 1e-9)
    said = f"{done.rows} rows in {settings.output}; {done.new} of them now, {rate:.0f} rows a second"
    if done.bad:
        said += f"; {done.bad} rows that could not be used in {settings.bad_path}"
    typer.echo(said, err=True)
