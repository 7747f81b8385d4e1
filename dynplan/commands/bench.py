"""``dynplan bench``: the checkout's bench/ files, or a few packaged timings where there is no checkout."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

NAME = "bench"


def command(
    select: Annotated[
        str | None, typer.Option("-k", help="Only benchmarks whose name matches, as in pytest -k.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The checkout's bench/ [default: found beside dynplan].")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Without bench/: timed calls of each contestant.")] = 20,
) -> None:
    """Time ops and whole models beside their rivals; every result is checked before it is timed."""
    folder = folder or find_bench()
    if folder is not None:
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", *(["-k", select] if select else [])]
        order = [sys.executable, "-m", "pytest", str(folder), *options]
        raise typer.Exit(subprocess.run(order, cwd=folder.parent).returncode)
    from dynplan.commands.microbench import run_microbench

    run_microbench(rounds)


def find_bench() -> Path | None:
    """bench/ of the checkout that this dynplan was imported from, if it was imported from one."""
    import dynplan

    folder = Path(dynplan.__file__).parent.parent / "bench"
    return folder if any(folder.glob("bench_*.py")) else None
