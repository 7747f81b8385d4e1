"""``dynplan bench``: the checkout's bench/ files, or a few packaged timings where there is no checkout.

``dynplan bench --profile``: where the time of a forward goes.
"""

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
        Path | None, typer.Option(help="The checkout's bench/.", show_default="found beside dynplan")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=10**6, help="Without bench/: timed calls of each.")] = 20,
    profile: Annotated[bool, typer.Option("--profile", help="Where does a forward spend its time?")] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="--profile: folder of an encoder.", show_default="12 layers of width 384, random"),
    ] = None,
    length: Annotated[
        int, typer.Option(min=2, max=512, help="--profile: tokens of the longest sample.")
    ] = 32,
    share: Annotated[float, typer.Option(min=0, max=1, help="--profile: share of the layers kept.")] = 1.0,
    exits: Annotated[
        bool, typer.Option("--exits", help="--profile: with answers asked on the way, twice.")
    ] = False,
    picture: Annotated[Path, typer.Option(help="--profile: PNG to write.")] = Path("dynplan-profile.png"),
) -> None:
    """Time ops and whole models beside their rivals; every result is checked before it is timed."""
    if profile:
        from dynplan.profiling import bench_profile

        bench_profile(model, length=length, share=share, picture=picture, exits=exits)
        return
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
