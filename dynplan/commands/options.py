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
Model = Annotated[Path, typer.Option(help="Folder of a Hugging Face model, swapped and saved or not.")]
Inputs = Annotated[
    list[Path],
    typer.Option("--input", help="File, folder or quoted pattern of rows; may be given again."),
]
Output = Annotated[
    Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet; .gz and .zst allowed.")
]
Key = Annotated[
    str | None,
    typer.Option(help="Column that rows are known by in the output.", show_default="file and row"),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Write rows that cannot be used to a file of their own and go on.")
]
BadRows = Annotated[Path | None, typer.Option(help="That file, JSON lines.", show_default="OUTPUT.bad.jsonl")]
Budget = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of layer work.", show_default="the saved one")
]
StreamBudget = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of layer work of all rows together, in the place of --budget.",
        show_default="the saved one",
    ),
]
Burst = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="--stream-budget: rows whose layers may be run before others saved them.",
        show_default="16",
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="int8 or bfloat16: type of the products.", show_default="the model's own")
]
BatchSize = Annotated[int, typer.Option(min=1, max=2**20, help="Rows of a forward.")]
WindowSize = Annotated[
    int, typer.Option(min=1, max=2**31, help="Rows sorted by length, and redone at most after a kill.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, max=2**20, help="Tokens; longer rows are cut.", show_default="as in training"),
]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes that tokenize; 0: this one does.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Run on this Ray cluster, `local` for one of this machine; --output is then a folder of files.",
        show_default="in this process",
    ),
]
Actors = Annotated[int, typer.Option(min=1, max=2**20, help="--ray: actors that hold the model.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run of the same settings that was interrupted.")
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
