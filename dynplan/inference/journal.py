"""What a run has done so far, kept so that a process that is killed at any moment loses and doubles nothing.

Everything stands in the folder OUTPUT.unfinished until the run is whole. A window's rows are appended first
and brought to the disk; then the journal, in one step, says how far the files are good. Whoever goes on cuts
off what stands behind that.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dynplan.errors import InputError
from dynplan.files import discard_folder, drop_unfinished, write_whole, writing

_JOURNAL, _ROWS, _BAD, _FINISHED = "journal.json", "rows", "bad", "finished"


@dataclass
class Progress:
    """How far a run is: windows done of file number ``file`` and the digest of what they read of it; rows
    and bad rows of all; size of both files; stream: what the stream's budget has counted, None where there
    is none; settling: all windows are done.
    """

    file: int = 0
    windows: int = 0
    digest: str = ""
    rows: int = 0
    bad: int = 0
    rows_size: int = 0
    bad_size: int = 0
    stream: dict | None = None
    settling: bool = False


class Journal:
    """The folder of an unfinished run; a context manager that holds it for this process alone.

    Args:
        output: of the run.
        bad: for the rows that cannot be used.
        settings: what the run is made of, as JSON has it; a run goes on under the same only.
        resume: go on with the run that is there, if there is one.

    Raises:
        InputError: ``output`` or ``bad`` is there already; there is an unfinished run, and ``resume`` is not
            set; or one of other settings, of another process, or damaged.
    """

    @staticmethod
    def folder_of(output: Path) -> Path:
        return output.with_name(output.name + ".unfinished")

    @staticmethod
    def is_whole(output: Path) -> bool:
        """Whether a run has finished ``output`` and left nothing to do."""
        return output.exists() and not Journal.folder_of(output).exists()

    def __init__(self, output: Path, bad: Path, settings: dict, resume: bool):
        self.output, self.bad, self.settings = output, bad, settings
        self.folder = self.folder_of(output)
        self.progress = Progress()
        self._lock: int | None = None
        self._open(resume)

    def _open(self, resume: bool) -> None:
        shutil.rmtree(self.folder.with_name(f".dropped-{self.folder.name}"), ignore_errors=True)
        there = self.folder.exists()
        if there and not resume:
            raise InputError(
                f"--output: expected no unfinished run, got {self.folder}; "
                "--resume goes on with it, or remove the folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"--output: expected a place to write to, got {self.output} ({error.strerror})"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise InputError(
                f"--output: expected no other process at work on it, got one in {self.folder}"
            ) from error
        try:
            drop_unfinished(self.folder, (_JOURNAL,))
            if (self.folder / _JOURNAL).exists():
                self._read()
            else:
                self._begin()
        except BaseException:
            self.close()
            raise

    def _refuse_to_replace(self) -> None:
        for option, path in (("--output", self.output), ("--bad-rows", self.bad)):
            if path.exists():
                raise InputError(f"{option}: expected no file of that name, got {path}")

    def _begin(self) -> None:
        try:
            self._refuse_to_replace()
        except InputError:
            shutil.rmtree(self.folder)
            raise
        with writing(self.folder):
            for name in (_ROWS, _BAD):
                (self.folder / name).write_bytes(b"")
            self._write()

    def _read(self) -> None:
        try:
            described = json.loads((self.folder / _JOURNAL).read_bytes())
            settings, self.progress = described["settings"], Progress(**described["progress"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--resume: expected a journal in {self.folder}, got {error}") from error
        changed = [
            f"{name} {self.settings.get(name)} (it began with {settings.get(name)})"
            for name in sorted(self.settings | settings)
            if settings.get(name) != self.settings.get(name)
        ]
        if changed:
            raise InputError(
                f"--resume: expected the settings of the run in {self.folder}, got {', '.join(changed)}"
            )
        if self.progress.settling:
            return
        self._refuse_to_replace()
        for name, size in ((_ROWS, self.progress.rows_size), (_BAD, self.progress.bad_size)):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise InputError(f"--resume: expected {size} bytes or more in {path}, got fewer")
            os.truncate(path, size)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, piece: bytes, bad_piece: bytes = b"", **progress) -> None:
        """Keep the bytes of a window, and what changes in :attr:`progress` with them."""
        with writing(self.folder):
            for name, data in ((_ROWS, piece), (_BAD, bad_piece)):
                if data:
                    with open(self.folder / name, "ab") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
            was = self.progress
            sizes = {"rows_size": was.rows_size + len(piece), "bad_size": was.bad_size + len(bad_piece)}
            self.progress = Progress(**{**asdict(was), **sizes, **progress})
            self._write()

    def settle(self, finish: Callable[[Path, Path], None]) -> None:
        """Have ``finish`` make the output of the pieces, and put it and the bad rows in their places."""
        rows, finished, bad = (self.folder / name for name in (_ROWS, _FINISHED, _BAD))
        if not self.progress.settling:
            self._refuse_to_replace()  # somebody else may have written there meanwhile
        with writing(self.output):
            self.progress.settling = True
            self._write()
            # A process that was killed here may have done any of these already, in this order.
            if not self.output.exists():
                if rows.exists():
                    finish(rows, finished)
                self._bring_to_disk(finished)
                if self.progress.bad and bad.exists():
                    os.replace(bad, self.bad)
                os.replace(finished, self.output)
            self._bring_to_disk(self.output.parent)
            discard_folder(self.folder)

    def _write(self) -> None:
        described = {"settings": self.settings, "progress": asdict(self.progress)}
        write_whole(self.folder / _JOURNAL, json.dumps(described, indent=2) + "\n")

    @staticmethod
    def _bring_to_disk(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
