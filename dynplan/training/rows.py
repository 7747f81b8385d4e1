"""Labelled sentences from files: JSON lines, CSV, TSV or parquet, each plain or through gzip.

The name says which: ``.csv``, ``.tsv``, ``.parquet`` (which needs pyarrow), anything else is JSON lines;
``.gz`` behind it means gzip. CSV and TSV begin with a line of column names. TSV has no quotes, as in GLUE's
files: a quotation mark is a character like any other, and a sentence holds neither tabs nor line breaks.
"""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynplan.errors import InputError

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
Record = tuple[str, dict]


@dataclass(frozen=True)
class Columns:
    """Names of the columns. ``pair``: of the second sentence; None: ``sentence2``, where there is one."""

    text: str = "sentence1"
    pair: str | None = None
    label: str = "label"


def read_rows(path, columns: Columns = Columns()) -> list[dict]:
    """Read a file into ``{"sentence1", "sentence2" (or None), "label"}`` dicts.

    Labels of CSV and TSV are whole numbers if all of them are, else numbers if all are, else strings.

    Raises InputError, naming file and line, for what cannot be read or is damaged, a column that is missing,
    a sentence that is no string, a label that is neither a number nor a string, or a file without rows.
    """
    path = Path(path)
    packed = path.suffix == ".gz"
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    reader = {".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".pq": _parquet}.get(suffix, _json_lines)
    rows, places = [], []
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            for place, record in reader(file, path):
                rows.append(_row(place, record, columns))
                places.append(place)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        kind = "JSON lines" if reader is _json_lines else suffix[1:]
        raise InputError(f"{path}: expected a readable file of {kind}, got {reason}") from error
    if not rows:
        raise InputError(f"{path}: expected at least one row, got none")
    if reader in (_csv, _tsv):
        _type_labels(rows)
    for place, row in zip(places, rows, strict=True):
        _check_label(place, columns.label, row["label"])
    return rows


def _json_lines(file, path: Path) -> Iterator[Record]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: expected one JSON object a line, got {error.msg} at column {error.colno}"
            ) from error
        except RecursionError as error:
            raise InputError(f"{place}: expected one JSON object a line, got too deep a one") from error
        except ValueError as error:  # a number of more digits than Python converts
            raise InputError(f"{place}: expected numbers of at most 64 bits, got a longer one") from error
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(record).__name__}")
        yield place, record


def _csv(file, path: Path) -> Iterator[Record]:
    return _table(csv.reader(_text(file), strict=True), path)


def _tsv(file, path: Path) -> Iterator[Record]:
    return _table(csv.reader(_text(file), delimiter="\t", quoting=csv.QUOTE_NONE), path)


def _text(file) -> io.TextIOWrapper:
    # Spreadsheets put a byte order mark in front; the csv module wants line ends as they are.
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _table(lines, path: Path) -> Iterator[Record]:
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise InputError(f"{path}:1: expected columns of different names, got {_listed(names)}")
        for fields in lines:
            if not fields:
                continue
            place = f"{path}:{lines.line_num}"
            if len(fields) != len(names):
                raise InputError(f"{place}: expected {len(names)} fields as in line 1, got {len(fields)}")
            yield place, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{lines.line_num}: expected a line of {path.name}, got {error}") from error


def _parquet(file, path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: expected pyarrow to be installed; run: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
        records = table.to_pylist()
    except pyarrow.ArrowException as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{path}: expected a readable parquet file, got {line}") from error
    for number, record in enumerate(records, 1):
        yield f"{path}: row {number}", record


def _row(place: str, record: dict, columns: Columns) -> dict:
    def field(name: str, option: str):
        if name not in record:
            raise InputError(
                f"{place}: expected a column {name!r}, got {_listed(record)}; {option} names another"
            )
        return record[name]

    def sentence(name: str, value) -> str:
        if not isinstance(value, str):
            raise InputError(f"{place}: expected {name!r} to be a string, got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: expected {name!r} to be text, got half a surrogate pair") from error
        return value

    first = sentence(columns.text, field(columns.text, "--text"))
    if columns.pair is None:
        name, second = "sentence2", record.get("sentence2")
    else:
        name, second = columns.pair, field(columns.pair, "--text-pair")
    if second is not None:
        second = sentence(name, second)
    return {"sentence1": first, "sentence2": second, "label": field(columns.label, "--label")}


def _check_label(place: str, name: str, label) -> None:
    if isinstance(label, bool) or not isinstance(label, (int, float, str)):
        raise InputError(f"{place}: expected {name!r} to be a number or a string, got {type(label).__name__}")
    if isinstance(label, float) and not math.isfinite(label):
        raise InputError(f"{place}: expected {name!r} to be a finite number, got {label}")
    if isinstance(label, int) and not -(2**63) <= label < 2**63:
        raise InputError(f"{place}: expected {name!r} to be a number of at most 64 bits, got a longer one")
    if isinstance(label, str) and (not label or not label.isascii()):
        try:
            empty = not label.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: expected {name!r} to be text, got half a surrogate pair") from error
        if empty:
            raise InputError(f"{place}: expected {name!r} to be a number or a string, got nothing")


def _type_labels(rows: list[dict]) -> None:
    labels = [row["label"].strip() for row in rows]
    if all(map(_WHOLE.fullmatch, labels)):
        labels = [int(label) for label in labels]
    elif all(map(_DECIMAL.fullmatch, labels)):
        labels = [float(label) for label in labels]
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label


def _listed(names) -> str:
    """Names for a message: the first dozen."""
    names = [repr(name) for name in names] or ["none"]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
