"""The output, in pieces that can be appended to what is there and cut off again behind any of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from dynplan.errors import InputError
from dynplan.inference.fields import Field, schema_of
from dynplan.records import file_kind

_GROUP_BYTES = 2**24  # of a row group of parquet


class Output:
    """What is written for one window after the other, and what the pieces become in the end.

    Args:
        path: of the output; its name says the format, as for files that are read.
        fields: the columns.

    Raises:
        InputError: a packed parquet file, or a name that TSV cannot hold.
    """

    def __init__(self, path: Path, fields: Sequence[Field]):
        self.path, self.fields = path, list(fields)
        self.kind, self.packed = file_kind(path)
        if self.kind == "parquet" and self.packed:
            raise InputError(f"--output: expected .parquet, which is packed inside, got {path.name}")
        for field in fields:
            if any(character in field.name for character in not_in_keys(path)):
                raise InputError(
                    f"--output: expected columns without tabs and line breaks for TSV, got {field.name!r}"
                )

    def header(self) -> bytes:
        """The first piece."""
        if self.kind == "parquet":
            return schema_of(self.fields).serialize().to_pybytes()
        if self.kind == "jsonl":
            return b""
        return self._pack(self._lines([list(self._flat_names())]))

    def piece(self, rows: pyarrow.RecordBatch) -> bytes:
        """The piece of a window; without rows there is none."""
        if not rows.num_rows:
            return b""
        if self.kind == "parquet":
            return rows.serialize().to_pybytes()
        columns = [_values(field, rows.column(field.name)) for field in self.fields]
        if self.kind == "jsonl":
            names = [field.name for field in self.fields]
            lines = (
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n"
                for row in zip(*columns, strict=True)
            )
            return self._pack("".join(lines))
        return self._pack(self._lines(_flat(row) for row in zip(*columns, strict=True)))

    def finish(self, pieces: Path, finished: Path) -> None:
        """Turn the file of all pieces into the output's own format; both may be there afterwards."""
        if self.kind != "parquet":
            os.replace(pieces, finished)
            return
        with (
            pyarrow.OSFile(str(pieces)) as source,
            parquet.ParquetWriter(finished, schema_of(self.fields), compression="zstd") as writer,
        ):
            for table in _groups(pyarrow.ipc.open_stream(source)):
                writer.write_table(table)

    def _flat_names(self) -> Iterator[str]:
        for field in self.fields:
            if field.kind == "vector":
                yield from (f"{field.name}_{i}" for i in range(field.width))
            else:
                yield field.name

    def _lines(self, rows) -> str:
        text = io.StringIO()
        if self.kind == "csv":
            csv.writer(text, lineterminator="\n").writerows(rows)
        else:
            text.writelines("\t".join(map(str, row)) + "\n" for row in rows)
        return text.getvalue()

    def _pack(self, text: str) -> bytes:
        data = text.encode()
        if self.packed == ".gz":
            return gzip.compress(data, mtime=0)
        if self.packed == ".zst":
            return pyarrow.Codec("zstd").compress(data, asbytes=True)
        return data


def not_in_keys(path: Path) -> str:
    """Characters that text in the output cannot hold."""
    return "\t\r\n" if file_kind(path)[0] == "tsv" else ""


def _groups(batches) -> Iterator[pyarrow.Table]:
    """Row groups of some size: a window by itself is a small one."""
    waiting: list[pyarrow.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(batch.nbytes for batch in waiting) >= _GROUP_BYTES:
            yield pyarrow.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pyarrow.Table.from_batches(waiting)


def _values(field: Field, column: pyarrow.Array) -> list:
    if field.kind == "real":
        return _shortest(column)
    if field.kind == "vector":
        flat = _shortest(column.flatten())
        return [flat[i : i + field.width] for i in range(0, len(flat), field.width)]
    return column.to_pylist()


def _shortest(column: pyarrow.Array) -> list[float]:
    """float32 as the float64 of the fewest digits that give it back."""
    return np.array(column.cast(pyarrow.string()).to_pylist(), dtype="U").astype(np.float64).tolist()


def _flat(row: tuple) -> list:
    return [part for value in row for part in (value if isinstance(value, list) else (value,))]
