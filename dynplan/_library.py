"""Loads the compiled ops, or says what to run when they are missing or built for another torch."""

import importlib
import json
from pathlib import Path

import torch

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <path to the dynplan sources>"
_BUILD_INFO = Path(__file__).with_name("_build_info.json")


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def build_info() -> dict:
    """What the extension was built with: version, torch, cuda (None for a CPU build), compiler, python."""
    if not _BUILD_INFO.exists():
        raise ImportError(f"dynplan: the compiled extension is not built\n  run: {REBUILD}")
    return json.loads(_BUILD_INFO.read_text())


def load() -> None:
    """Registers the ops of ``dynplan._C`` with torch.

    Raises:
        ImportError: the extension is not built, was built for another torch release, or cannot be loaded.
    """
    built_for = build_info()["torch"]
    if _release(built_for) != _release(torch.__version__):
        raise ImportError(
            f"dynplan: the extension was built for torch {built_for}, found torch {torch.__version__}\n"
            f"  run: {REBUILD}"
        )
    try:
        importlib.import_module("dynplan._C")
    except ImportError as error:
        raise ImportError(
            f"dynplan: the extension built for torch {built_for} does not load: {error}\n  run: {REBUILD}"
        ) from error


def find_op(name: str) -> torch._ops.OpOverload:
    """The compiled op ``dynplan::<name>``, bound once by the file that wraps it.

    Raises:
        ImportError: the loaded extension lacks it: it was built from older sources.
    """
    try:
        return getattr(torch.ops.dynplan, name).default
    except AttributeError:
        raise ImportError(
            f"dynplan: the op {name} is missing from the extension, which was built from older sources\n"
            f"  run: {REBUILD}"
        ) from None


load()
