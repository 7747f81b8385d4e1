"""The columns of an output and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow
import torch
from torch import Tensor

_TYPES = {"text": pyarrow.string(), "whole": pyarrow.int64(), "real": pyarrow.float32()}


@dataclass(frozen=True)
class Field:
    """A column.

    kind: "text", "whole" (number), "real" or "vector"; width: of a vector, which takes so many columns
    ``name_0``, ``name_1``... in CSV and TSV.
    """

    name: str
    kind: str
    width: int = 0

    @property
    def type(self) -> pyarrow.DataType:
        if self.kind == "vector":
            return pyarrow.list_(pyarrow.float32(), self.width)
        return _TYPES[self.kind]


def schema_of(fields: Sequence[Field]) -> pyarrow.Schema:
    return pyarrow.schema([(field.name, field.type) for field in fields])


def batch_of(fields: Sequence[Field], columns: dict[str, list | Tensor]) -> pyarrow.RecordBatch:
    """The rows as Arrow has them; a vector comes as float ``(N, width)``."""
    arrays = []
    for field in fields:
        values = columns[field.name]
        if isinstance(values, Tensor):
            values = values.to(torch.float32 if field.kind in ("real", "vector") else values.dtype).numpy()
        if field.kind == "vector":
            flat = pyarrow.array(values.reshape(-1))
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pyarrow.array(values, field.type))
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema_of(fields))


def path_text(kept: Sequence[bool]) -> str:
    """The layers of a path, runs of them as ranges: ``"0-3,5,8-11"``; no layer: ``""``."""
    runs: list[list[int]] = []
    for layer, keeps in enumerate(kept):
        if keeps and runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        elif keeps:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
