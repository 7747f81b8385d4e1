"""What a forward relies on between two calls: who stands where in which dictionary."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynplan import _native


class Places:
    """Entries of dictionaries that shall stay the objects they are, and hooks that nobody shall hang up.

    Modules keep their submodules, parameters and attributes in dictionaries. Read past their own attribute
    look-up, those tell at little cost whether a model is still what it was.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, str], tuple[dict, str, Any]] = {}
        self._hooks: list[dict] = []

    def stay(self, table: dict, name: str) -> Any:
        """``table[name]``, which shall stay."""
        value = table.get(name)
        self._places[id(table), name] = (table, name, value)
        return value

    def without_hooks(self, module: nn.Module) -> None:
        """No hook shall hang on ``module``."""
        self._hooks += (module._forward_hooks, module._forward_pre_hooks)

    def include(self, other: Places) -> None:
        """What ``other`` holds shall stay too."""
        self._places |= other._places
        self._hooks += other._hooks

    def watch(self) -> _native.Entries:
        """Whoever asks it ``same()`` learns whether all of it is still so."""
        tables, names, objects = zip(*self._places.values(), strict=True) if self._places else ((), (), ())
        return _native.Entries(list(tables), list(names), list(objects), self._hooks)
