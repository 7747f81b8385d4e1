"""The ``dynplan`` command: demo, finetune, evaluate, bench, env."""

import os
import sys

import typer
from rich.console import Console

from dynplan.commands import bench, demo, env, evaluate, finetune

app = typer.Typer(
    help="Per-sample layer planning for BERT-family encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (demo, finetune, evaluate, bench, env):
    app.command(module.NAME)(module.command)


def main() -> None:
    """Entry point: what the user got wrong is said in one line, without a traceback, with exit status 2."""
    # Weights come from local folders and packages; a stray lookup should fail at once instead of waiting for
    # a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app()
    except Exception as error:
        if type(error).__name__ != "InputError":
            raise
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
