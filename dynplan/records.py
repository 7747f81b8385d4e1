"""Records from files, one by one: JSON lines, CSV, TSV or parquet, each plain or through gzip or zstd.

The name says which: ``.csv``, ``.tsv``, ``.parquet``, anything else is JSON lines; ``.gz`` or ``.zst`` behind
it means that it is packed. Parquet and zstd need pyarrow. CSV and TSV begin with a line of column names. TSV
has no quotes, as in GLUE's files: a quotation mark is a character like any other, and a field holds neither
tabs nor line breaks.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dynplan.errors import InputError

_KINDS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet"}
_PACKED = (".gz", ".zst")
_PARQUET_ROWS = 1024  # converted to Python at a time


class BadRecord(ValueError):
    """A record that cannot be used; the message says what was expected and what came, not where."""


@dataclass(slots=True)
class Record:
    """What stands at one place of a file.

    place: "FILE:LINE", or "FILE: row N"; number: of the record in its file, from 1; values: by column, or
    None where ``problem`` says why they cannot be read; raw: then, the lines as they are.
    """

    place: str
    number: int
    values: dict | None
    problem: str | None = None
    raw: str | None = None


def file_kind(path: Path) -> tuple[str, str]:
    """What the name of a file says: "jsonl", "csv", "tsv" or "parquet"; and "", ".gz" or ".zst"."""
    packed = path.suffix.lower() if path.suffix.lower() in _PACKED else ""
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    return _KINDS.get(suffix, "jsonl"), packed


class RecordFile:
    """The records of one file, read as they are asked for.

    A record that cannot be read comes with its ``problem``, and the next ones follow. Iterating raises
    InputError, naming the file, where the file itself cannot be read or is damaged, where two columns have
    the same name, or where pyarrow is missing.

    Args:
        path: of the file.
        columns: to read of a parquet file, None: all. Names that it lacks are left out.
    """

    def __init__(self, path: str | Path, columns: tuple[str, ...] | None = None):
        self.path, self.columns = Path(path), columns
        self.kind, self.packed = file_kind(self.path)
        self._share = lambda: 0.0

    @property
    def share_read(self) -> float:
        """How much of the file has been read, 0..1."""
        return self._share()

    def __iter__(self) -> Iterator[Record]:
        reader = {"csv": self._csv, "tsv": self._tsv, "parquet": self._parquet, "jsonl": self._json_lines}
        try:
            with open(self.path, "rb") as file:
                size = max(1, file.seek(0, io.SEEK_END))
                file.seek(0)
                self._share = lambda: file.tell() / size
                try:
                    yield from reader[self.kind](self._unpacked(file))
                finally:
                    self._share = lambda: 1.0
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            kind = "JSON lines" if self.kind == "jsonl" else self.kind
            raise InputError(f"{self.path}: expected a readable file of {kind}, got {reason}") from error

    def _unpacked(self, file: BinaryIO) -> BinaryIO:
        if self.packed == ".gz":
            return gzip.open(file, "rb")
        if self.packed == ".zst":
            # The package zstandard takes a file that is cut off for one that ends there; pyarrow says so.
            return io.BufferedReader(need_pyarrow(self.path).CompressedInputStream(file, "zstd"))
        return file

    def _json_lines(self, file: BinaryIO) -> Iterator[Record]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place, raw = f"{self.path}:{number}", None
            try:
                raw = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield Record(place, number, _json_object(raw))
            except UnicodeDecodeError as error:
                raw = line.decode(errors="backslashreplace")
                yield Record(place, number, None, f"expected text in UTF-8, got {error.reason}", raw)
            except BadRecord as error:
                yield Record(place, number, None, str(error), raw)

    def _csv(self, file: BinaryIO) -> Iterator[Record]:
        return self._table(_Lines(file), strict=True)

    def _tsv(self, file: BinaryIO) -> Iterator[Record]:
        return self._table(_Lines(file), delimiter="\t", quoting=csv.QUOTE_NONE)

    def _table(self, lines: _Lines, **dialect: Any) -> Iterator[Record]:
        reader = csv.reader(lines, **dialect)
        try:
            names = next(reader, [])
            "".join(names).encode()
        except (csv.Error, UnicodeEncodeError) as error:
            problem = f"expected a line of {self.path.name}, got {error}"
            raise InputError(f"{self.path}:{reader.line_num}: {problem}") from error
        if len(set(names)) < len(names):
            raise InputError(f"{self.path}:1: expected columns of different names, got {listed_names(names)}")
        number = 0
        while True:
            lines.taken.clear()
            try:
                fields, problem = next(reader), None
            except StopIteration:
                return
            except csv.Error as error:
                fields, problem = None, f"expected a line of {self.path.name}, got {error}"
            if fields == []:
                continue
            number += 1
            place = f"{self.path}:{reader.line_num}"
            if fields is not None and len(fields) != len(names):
                problem = f"expected {len(names)} fields as in line 1, got {len(fields)}"
            raw = "".join(lines.taken)
            if problem is None and not _is_text(raw):
                problem = "expected text in UTF-8, got other bytes"
            if problem is None:
                yield Record(place, number, dict(zip(names, fields, strict=True)))
            else:
                raw = raw.encode(errors="surrogateescape").decode(errors="backslashreplace")
                yield Record(place, number, None, problem, raw)

    def _parquet(self, file: BinaryIO) -> Iterator[Record]:
        pyarrow = need_pyarrow(self.path)
        from pyarrow.parquet import ParquetFile

        try:
            with tempfile.TemporaryFile() as unpacked:
                if self.packed:  # parquet is read from its end
                    shutil.copyfileobj(file, unpacked)
                    file = unpacked
                table = ParquetFile(file)
                rows, number = max(1, table.metadata.num_rows), 0
                self._share = lambda: number / rows
                names = table.schema_arrow.names
                if self.columns is not None:
                    names = [name for name in self.columns if name in names]
                for batch in table.iter_batches(_PARQUET_ROWS, columns=names):
                    for values in batch.to_pylist():
                        number += 1
                        yield Record(f"{self.path}: row {number}", number, values)
        except pyarrow.ArrowException as error:
            line = str(error).splitlines()[0]
            raise InputError(f"{self.path}: expected a readable parquet file, got {line}") from error


class _Lines:
    """Lines of a table as the csv module wants them, and those that went into the present record."""

    def __init__(self, file: BinaryIO):
        # Spreadsheets put a byte order mark in front; the csv module wants line ends as they are. What is no
        # UTF-8 comes as surrogates, so that the lines behind it can be read.
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self.taken.append(line)
        return line


def _json_object(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(
            f"expected one JSON object a line, got {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise BadRecord("expected one JSON object a line, got too deep a one") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise BadRecord("expected numbers of at most 64 bits, got a longer one") from error
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, got {type(record).__name__}")
    return record


def need_pyarrow(path: Path):
    """The module; raises InputError where it is missing, naming the file that needs it."""
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{path}: expected pyarrow to be installed; run: pip install pyarrow") from error
    return pyarrow


def field(values: dict, name: str, option: str) -> Any:
    """The value of a column; raises BadRecord, naming the option that names another, where there is none."""
    if name not in values:
        raise BadRecord(f"expected a column {name!r}, got {listed_names(values)}; {option} names another")
    return values[name]


def as_sentence(name: str, value: Any) -> str:
    """``value`` if it is text, else raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord(f"expected {name!r} to be a string, got {type(value).__name__}")
    if not _is_text(value):
        raise BadRecord(f"expected {name!r} to be text, got half a surrogate pair")
    return value


def sentences(values: dict, text: str, pair: str | None) -> tuple[str, str | None]:
    """First and second sentence of a record.

    pair: column of the second sentence; None: ``sentence2``, where there is one. Raises BadRecord for a
    column that is missing and a sentence that is no text.
    """
    first = as_sentence(text, field(values, text, "--text"))
    name = "sentence2" if pair is None else pair
    second = values.get(name) if pair is None else field(values, pair, "--text-pair")
    return first, None if second is None else as_sentence(name, second)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed_names(names) -> str:
    """Names for a message: the first dozen."""
    names = [repr(name) for name in names] or ["none"]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
