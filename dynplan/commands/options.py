"""Options that several commands take."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from dynplan.errors import InputError

Text = Annotated[str, typer.Option(help="Column of the sentence.")]
TextPair = Annotated[
    str | None,
    typer.Option(help="Column of a second sentence.", show_default="sentence2, where there is one"),
]
Label = Annotated[str, typer.Option(help="Column of the label.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Processor threads.", show_default="torch's choice")
]
FILES = "JSON lines, .csv, .tsv or .parquet; .gz and .zst allowed."


def need(extra: str, *modules: str) -> None:
    """See that what an extra installs is there, before any time is spent."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(
            f"expected {', '.join(missing)} to be installed, got none; run: pip install 'dynplan[{extra}]'"
        )


def read(path: Path, text: str, text_pair: str | None, label: str) -> list[dict]:
    """The rows of a file under the columns that the options name."""
    from dynplan.training import Columns, read_rows

    return read_rows(path, Columns(text, text_pair, label))
