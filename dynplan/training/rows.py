"""Labelled sentences from files of records: see :mod:`dynplan.records`."""

import math
import re
from dataclasses import dataclass

from dynplan.errors import InputError
from dynplan.records import BadRecord, Record, RecordFile, field, sentences

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    Attributes:
        text: of the sentence.
        pair: of the second sentence; None: ``sentence2``, where there is one.
        label: of the label.
    """

    text: str = "sentence1"
    pair: str | None = None
    label: str = "label"


def read_rows(path, columns: Columns = Columns()) -> list[dict]:
    """Read a file of labelled sentences: JSON lines, CSV, TSV or parquet, plain, ``.gz`` or ``.zst``.

    Labels of CSV and TSV are whole numbers if all of them are, else numbers if all are, else strings.

    Args:
        path (str | Path): of the file; the name says its format.
        columns: names of the columns.

    Returns:
        ``{"sentence1", "sentence2" (or None), "label"}`` of each row.

    Raises:
        InputError: naming file and line: what cannot be read or is damaged, a column that is missing, a
            sentence
            that is no string, a label that is neither a number nor a string, a file without rows.
    """
    file, rows, places = RecordFile(path), [], []
    for record in file:
        rows.append(_row(record, columns))
        places.append(record.place)
    if not rows:
        raise InputError(f"{path}: expected at least one row, got none")
    if file.kind in ("csv", "tsv"):
        _type_labels(rows)
    for place, row in zip(places, rows, strict=True):
        _check_label(place, columns.label, row["label"])
    return rows


def _row(record: Record, columns: Columns) -> dict:
    try:
        if record.values is None:
            raise BadRecord(record.problem)
        first, second = sentences(record.values, columns.text, columns.pair)
        label = field(record.values, columns.label, "--label")
    except BadRecord as error:
        raise InputError(f"{record.place}: {error}") from error
    return {"sentence1": first, "sentence2": second, "label": label}


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
