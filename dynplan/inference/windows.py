"""Windows: the rows of the input, a bounded number at a time, in the order of the files.

A window never crosses from one file into the next, so that what is in it does not depend on who reads which
file. All that is done to rows, down to which of them share a batch, happens inside one window.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

from dynplan.errors import InputError
from dynplan.inference.fields import Field
from dynplan.records import BadRecord, Record, RecordFile, as_sentence, sentences
from dynplan.records import field as column_of


@dataclass(frozen=True)
class InputColumns:
    """Names of the columns that are read.

    Attributes:
        text: of the sentence.
        pair: of the second sentence; None: ``sentence2``, where there is one.
        key: of what rows are known by in the output; None: the file's name and the number of the row in it.
    """

    text: str = "sentence1"
    pair: str | None = None
    key: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        names = (self.text, self.pair or "sentence2", self.key)
        return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Shape:
    """What the first usable row says of all: whether there are two sentences, and the kind of the key."""

    paired: bool = False
    key_kind: str = "text"


@dataclass(slots=True)
class Window:
    """Rows that are handled together.

    file: number of the file, from 0; number: of the window in it; keys: columns of the output that say which
    row it is; seconds: None without second sentences; bad: rows that cannot be used, as they are reported;
    share: of the file that was read; digest: of the file from its beginning to the end of this window.
    """

    file: int
    number: int
    keys: dict[str, list] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    firsts: list[str] = field(default_factory=list)
    seconds: list[str] | None = None
    bad: list[dict] = field(default_factory=list)
    share: float = 0.0
    digest: str = ""

    def __len__(self) -> int:
        return len(self.firsts)


def find_inputs(patterns: Iterable[str | Path]) -> list[Path]:
    """The files that are meant: a file, a folder for all files in it, or a pattern such as ``rows/*.csv``.

    Folders and patterns give their files by name. Raises InputError for one that gives none, and for a file
    that is meant twice.
    """
    found: list[Path] = []
    for pattern in map(Path, patterns):
        if pattern.is_dir():
            files = [path for path in sorted(pattern.iterdir()) if path.is_file()]
            files = [path for path in files if not path.name.startswith(".")]
        elif pattern.exists():
            files = [pattern]
        else:
            files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
            files = [path for path in files if path.is_file()]
        if not files:
            raise InputError(f"--input: expected a file, a folder of files or a pattern, got {pattern}")
        found += files
    for path in found:
        if found.count(path) > 1:
            raise InputError(f"--input: expected every file once, got {path} more than once")
    return found


@dataclass(frozen=True)
class WindowReader:
    """Reads files as windows.

    Args:
        files: as :func:`find_inputs` gives them.
        columns: to read.
        size: rows of a window, usable or not; the last one of a file may have fewer.
        skip_bad: rows that cannot be used go to :attr:`Window.bad`; otherwise they raise InputError.
        not_in_keys: characters that the output cannot hold.
    """

    files: tuple[Path, ...]
    columns: InputColumns = InputColumns()
    size: int = 2048
    skip_bad: bool = False
    not_in_keys: str = ""

    def shape(self) -> Shape:
        """By the first usable row; raises InputError for one before it, unless those are skipped."""
        for path in self.files:
            for record in RecordFile(path, self.columns.names):
                try:
                    _, second = self._sentences(record)
                    kind = "text" if self.columns.key is None else self._key_kind(record)
                except BadRecord as error:
                    self._refuse(record, error)
                    continue
                return Shape(second is not None, kind)
        return Shape()

    def key_fields(self, shape: Shape) -> list[Field]:
        if self.columns.key is None:
            return [Field("file", "text"), Field("row", "whole")]
        return [Field(self.columns.key, shape.key_kind)]

    def read(self, number: int, shape: Shape) -> Iterator[Window]:
        """The windows of file ``number``. Raises InputError as :class:`~dynplan.records.RecordFile` does."""
        file = RecordFile(self.files[number], self.columns.names)
        records, digest = iter(file), hashlib.sha256()
        for index in count():
            window = self._window(number, index, list(islice(records, self.size)), shape, digest)
            if not len(window) and not window.bad:
                return
            window.share, window.digest = file.share_read, digest.hexdigest()
            yield window

    def _window(self, file: int, index: int, records: list[Record], shape: Shape, digest) -> Window:
        keys = {key.name: [] for key in self.key_fields(shape)}
        window = Window(file, index, keys, seconds=[] if shape.paired else None)
        for record in records:
            try:
                first, second = self._sentences(record)
                if shape.paired != (second is not None):
                    raise BadRecord("expected a second sentence in every row or in none")
                key = self._key(record, shape)
            except BadRecord as error:
                self._refuse(record, error)
                window.bad.append(self._report(file, record, error))
                digest.update(repr(window.bad[-1]).encode())
                continue
            for column, value in zip(keys.values(), key, strict=True):
                column.append(value)
            window.places.append(record.place)
            window.firsts.append(first)
            if shape.paired:
                window.seconds.append(second)
            digest.update(repr((key, first, second)).encode())
        return window

    def _sentences(self, record: Record) -> tuple[str, str | None]:
        if record.values is None:
            raise BadRecord(record.problem)
        return sentences(record.values, self.columns.text, self.columns.pair)

    def _key(self, record: Record, shape: Shape) -> tuple:
        if self.columns.key is None:
            return record.place.rpartition(":")[0], record.number
        kind = self._key_kind(record)
        if kind != shape.key_kind:
            names = {"text": "a string", "whole": "a whole number"}
            raise BadRecord(
                f"expected {self.columns.key!r} to be {names[shape.key_kind]} as in the first row, "
                f"got {names[kind]}"
            )
        return (record.values[self.columns.key],)

    def _key_kind(self, record: Record) -> str:
        name = self.columns.key
        value = column_of(record.values, name, "--key")
        if isinstance(value, int) and not isinstance(value, bool):
            if not -(2**63) <= value < 2**63:
                raise BadRecord(f"expected {name!r} to be a number of at most 64 bits, got a longer one")
            return "whole"
        as_sentence(name, value)
        if any(character in value for character in self.not_in_keys):
            raise BadRecord(f"expected {name!r} without tabs and line breaks, which TSV cannot hold")
        return "text"

    def _refuse(self, record: Record, error: BadRecord) -> None:
        if not self.skip_bad:
            raise InputError(f"{record.place}: {error}; --skip-bad goes on without such rows") from error

    def _report(self, file: int, record: Record, error: BadRecord) -> dict:
        row = record.raw if record.values is None else record.values
        report = {"place": record.place, "row": record.number, "problem": str(error), "content": row}
        # What JSON has no type for (dates of a parquet file) as its text.
        return json.loads(json.dumps(report, default=str))
