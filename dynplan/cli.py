"""The ``dynplan`` command: demo, finetune, evaluate, study, predict, embed, bench, env."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dynplan.commands import bench, demo, embed, env, evaluate, finetune, predict, study
from dynplan.errors import InputError

app = typer.Typer(
    help="Per-sample layer planning for BERT-family encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes brackets for markup, and cuts long names of options to fit its boxes
)
for module in (demo, finetune, evaluate, study, predict, embed, bench, env):
    app.command(module.NAME)(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        import dynplan

        typer.echo(f"dynplan {dynplan.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: what the user got wrong is said in one line, without a traceback, with exit status 2."""
    # Weights come from local folders and packages; a stray lookup should fail at once instead of waiting for
    # a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app()
    except InputError as error:
        # Text, not markup: what came may hold brackets.
        Console(stderr=True).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
