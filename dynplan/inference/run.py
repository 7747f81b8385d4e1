"""The run in one process: windows are read, tokenized ahead, run, appended, and in the end the output is put
in its place.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

import dynplan
from dynplan.errors import InputError
from dynplan.inference.formats import Output, not_in_keys
from dynplan.inference.forwards import WindowRunner
from dynplan.inference.journal import Journal
from dynplan.inference.models import ModelSettings, RunModel
from dynplan.inference.tokens import TokenPool
from dynplan.inference.windows import InputColumns, Shape, Window, WindowReader, find_inputs
from dynplan.loading import load_tokenizer

_BAR = "{desc}: {postfix}, {percentage:.0f}% read, {remaining} left"


@dataclass(frozen=True)
class RunSettings:
    """Everything a run is made of.

    Args:
        model: the model's settings.
        inputs: files, folders or patterns.
        output: file, whose name says the format.
        columns: names of the columns.
        skip_bad: write rows that cannot be used to a file of their own and go on.
        bad: that file; None: ``OUTPUT.bad.jsonl``.
        batch_size: rows of a forward.
        window: rows that are sorted by length, and lost from the work of a killed process.
        max_length: tokens that rows are cut to; None: as in training, or what the model has room for.
        workers: processes that tokenize; 0: none.

    Raises:
        InputError: a number out of its range.
    """

    model: ModelSettings
    inputs: tuple[Path | str, ...]
    output: Path
    columns: InputColumns = InputColumns()
    skip_bad: bool = False
    bad: Path | None = None
    batch_size: int = 32
    window: int = 2048
    max_length: int | None = None
    workers: int = 1

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("window", 1), ("workers", 0)):
            if getattr(self, name) < least:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option}: expected a whole number from {least}, got {getattr(self, name)}")

    @property
    def bad_path(self) -> Path:
        """File for rows that cannot be used."""
        return self.bad or self.output.with_name(self.output.name + ".bad.jsonl")

    def reader(self) -> WindowReader:
        """Reads the rows in windows; raises InputError for inputs that are not there."""
        return WindowReader(
            tuple(find_inputs(self.inputs)),
            self.columns,
            self.window,
            self.skip_bad,
            not_in_keys(self.output),
        )

    def length(self, model: RunModel) -> int:
        """Tokens that rows are cut to; raises InputError for more than the model has room for."""
        length = model.max_length if self.max_length is None else self.max_length
        if length > model.longest:
            raise InputError(
                f"--max-length: expected at most the model's {model.longest} positions, got {length}"
            )
        return length

    def described(self, files: tuple[Path, ...], max_length: int) -> dict:
        """What the result depends on, as JSON has it."""
        model = asdict(self.model) | {"folder": folder_digest(Path(self.model.folder))}
        described = {
            "version": dynplan.__version__,
            "--input": [path.name for path in files],
            "columns": asdict(self.columns),
            "--batch-size": self.batch_size,
            "--window": self.window,
            "--max-length": max_length,
            **{f"model {name}": value for name, value in model.items()},
        }
        return json.loads(json.dumps(described))


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: written in all.
        bad: rows that could not be used.
        new: rows of this process.
        seconds: its time with the model loaded.
    """

    rows: int
    bad: int
    new: int
    seconds: float


def run(
    settings: RunSettings, resume: bool = False, progress: bool = True, model: RunModel | None = None
) -> Summary | None:
    """Run a model over files.

    Killed at any moment and called again with ``resume``, it gives the same bytes as without.

    Args:
        settings: of the run.
        resume: go on with what an unfinished run has left.
        progress: whether a bar is shown.
        model: of ``settings.model``, where it is loaded already.

    Returns:
        What was done; None where ``resume`` finds the output whole already.

    Raises:
        InputError: what cannot be used, naming file and line of a row. What was done before stays, and
            ``resume`` goes
            on there once the row is mended.
    """
    if resume and Journal.is_whole(settings.output):
        return None
    reader = settings.reader()
    shape = reader.shape()
    model = model or settings.model.load()
    tokenizer = load_tokenizer(settings.model.folder)
    runner = WindowRunner(model, reader.key_fields(shape), settings.batch_size, tokenizer.pad_token_id)
    output, length = Output(settings.output, runner.fields), settings.length(model)
    described = settings.described(reader.files, length)
    with Journal(settings.output, settings.bad_path, described, resume) as journal:
        done = journal.progress
        before, start = done.rows, time.perf_counter()
        if not done.settling:
            if not done.rows_size:
                journal.append(output.header())
            model.begin(done.stream)
            pool = TokenPool(settings.model.folder, length, settings.workers)
            with _Bar(reader.files, settings.model.task, progress) as bar:
                for window, tokens in pool.encode(_left(reader, shape, journal)):
                    rows = runner(window, tokens)
                    bad = "".join(json.dumps(row) + "\n" for row in window.bad)
                    was = journal.progress
                    journal.append(
                        output.piece(rows),
                        bad.encode(),
                        file=window.file,
                        windows=window.number + 1,
                        digest=window.digest,
                        rows=was.rows + rows.num_rows,
                        bad=was.bad + len(window.bad),
                        stream=model.stream,
                    )
                    bar.show(window, journal.progress.rows, rows.num_rows)
        journal.settle(output.finish)
        done = journal.progress
        return Summary(done.rows, done.bad, done.rows - before, time.perf_counter() - start)


def _left(reader: WindowReader, shape: Shape, journal: Journal) -> Iterator[Window]:
    """The windows that the journal does not hold yet."""
    done = replace(journal.progress)
    for number in range(done.file, len(reader.files)):
        skip, digest = done.windows if number == done.file else 0, ""
        for window in reader.read(number, shape):
            if window.number < skip:
                digest = window.digest
                continue
            if window.number == skip > 0:
                _check_same(reader.files[number], digest, done.digest)
            yield window
        if skip:
            _check_same(reader.files[number], digest, done.digest)


def _check_same(path: Path, digest: str, wanted: str) -> None:
    if digest != wanted:
        raise InputError(f"--resume: expected the rows of {path} as they were, got others")


def folder_digest(folder: Path) -> str:
    """SHA-256 of the files in a model's folder: a result made of two models would be neither's."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin"):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


class _Bar:
    """Rows, rows a second and the time left, on one line of the terminal; in a file it would be one for each
    window.
    """

    def __init__(self, files: tuple[Path, ...], title: str, progress: bool):
        self.sizes = [path.stat().st_size for path in files]
        hidden = not (progress and sys.stderr.isatty())
        self.bar = tqdm(total=sum(self.sizes), desc=title, bar_format=_BAR, leave=False, disable=hidden)
        self.start, self.new = time.perf_counter(), 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, window: Window, rows: int, new: int) -> None:
        done = sum(self.sizes[: window.file]) + window.share * self.sizes[window.file]
        self.new += new
        rate = self.new / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rows} rows, {rate:.0f} rows a second", refresh=False)
        self.bar.update(done - self.bar.n)
