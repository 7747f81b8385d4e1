"""``dynplan demo``: the main job on real weights and real sentences."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "demo"


def command(
    output: Annotated[Path, typer.Option(help="Folder for the report and the model.")] = Path("dynplan-demo"),
    quick: Annotated[
        bool, typer.Option(help="A few hundred sentences: shows that everything runs, in seconds.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
) -> None:
    """Fine-tune a real encoder on real film reviews, plan its layers per sample, compare and report."""
    from dynplan.demo import run_demo
    from dynplan.loading import quiet

    quiet()
    run_demo(output, quick=quick, seed=seed)
