"""Files and folders that are there whole or not at all, whenever the process is killed or the disk is full.

Everything is written under another name, brought to the disk and then renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dynplan.errors import WriteError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write so that ``path`` holds either what it held before or all of ``content``; text as UTF-8."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; a saved model is as readable as its neighbours.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a failed write does not say of what
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a line what kept ``path`` from being written, by whichever library."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WriteError(f"{path}: expected to write it, got {reason}") from error


def fresh_folder(path: Path) -> Path:
    """An empty folder at ``path``; what an interrupted run left there is dropped."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def settle_folder(temporary: Path, path: Path) -> None:
    """Rename the finished folder ``temporary`` to ``path``, in the place of what is there."""
    for file in temporary.rglob("*"):
        _sync(file)
    _sync(temporary)
    discard_folder(path)
    os.replace(temporary, path)
    _sync(path.parent)


def settle_files(temporary: Path, folder: Path, last: Iterable[str]) -> None:
    """Move everything in the finished folder ``temporary`` into ``folder``, those named in ``last`` after all
    others, and remove ``temporary``.
    """
    last = list(last)
    names = sorted(os.listdir(temporary), key=lambda name: (name in last, name))
    for name in names:
        _sync(temporary / name)
        if (temporary / name).is_dir():
            discard_folder(folder / name)
        os.replace(temporary / name, folder / name)
    _sync(folder)
    temporary.rmdir()


def drop_unfinished(folder: Path, files: Iterable[str]) -> None:
    """Remove what a killed process left of :func:`write_whole` and the others, for files of these names."""
    for name in files:
        for path in folder.glob(f".{name}.*"):
            path.unlink()
    for path in (*folder.glob(".dropped-*"), folder / ".unfinished"):
        shutil.rmtree(path, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Remove a folder, if it is there; at no time is half of it left under its name."""
    if path.is_dir():
        dropped = path.with_name(f".dropped-{path.name}")
        shutil.rmtree(dropped, ignore_errors=True)
        os.replace(path, dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
