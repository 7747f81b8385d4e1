"""A window through the model: sorted by length, batch by batch, back in the order of the rows."""

from __future__ import annotations

import numpy as np
import pyarrow
import torch
from torch import Tensor

from dynplan.errors import InputError
from dynplan.inference.fields import Field, batch_of, path_text, schema_of
from dynplan.inference.models import RunModel
from dynplan.inference.tokens import Tokens
from dynplan.inference.windows import Window

PLAN_FIELDS = (Field("path", "text"), Field("layers", "whole"))


class WindowRunner:
    """Runs windows through a model.

    Args:
        model: to run.
        keys: fields of a window's keys.
        batch_size: rows of a forward.
        pad: padding token.

    Raises:
        InputError: a column for keys is called like one for what comes out.
    """

    def __init__(self, model: RunModel, keys: list[Field], batch_size: int, pad: int):
        self.model, self.batch_size, self.pad = model, batch_size, pad
        self.fields = [*keys, *model.fields, *PLAN_FIELDS]
        names = [field.name for field in self.fields]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"--key: expected a name that no column of the output has, got {name!r}")

    @torch.inference_mode()
    def __call__(self, window: Window, tokens: Tokens) -> pyarrow.RecordBatch:
        """The rows of the output; raises InputError where the model gives numbers that are not finite, or
        does not know a token.
        """
        if tokens.ids.size and tokens.ids.max() >= self.model.vocabulary:
            raise InputError(
                f"tokenizer: expected tokens below the model's {self.model.vocabulary}, "
                f"got {tokens.ids.max()}"
            )
        self.model.restart(window.file, window.number)
        order = np.argsort(-tokens.lengths, kind="stable")
        starts = np.concatenate(([0], tokens.lengths.cumsum()))
        outputs, plans = [], []
        for first in range(0, len(order), self.batch_size):
            output, plan = self.model.run(self._pad(tokens, starts, order[first : first + self.batch_size]))
            outputs.append(output)
            plans.append(plan)
        if not outputs:  # all rows of the window are bad
            return pyarrow.RecordBatch.from_pylist([], schema_of(self.fields))
        back = torch.from_numpy(np.argsort(order))
        output, plan = torch.cat(outputs)[back], torch.cat(plans)[back]
        self._check(window, output)
        kept = list(map(tuple, plan.tolist()))
        paths = {path: path_text(path) for path in set(kept)}
        columns = {**window.keys, **self.model.columns(output)}
        columns |= {"path": [paths[path] for path in kept], "layers": plan.sum(1)}
        return batch_of(self.fields, columns)

    def _pad(self, tokens: Tokens, starts: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        lengths = tokens.lengths[rows]
        inside = np.arange(max(1, lengths.max())) < lengths[:, None]
        places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
        ids = np.full(inside.shape, self.pad, np.int64)
        ids[inside] = tokens.ids[places]
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(inside).long()}
        if tokens.types is not None:
            types = np.zeros(inside.shape, np.int64)
            types[inside] = tokens.types[places]
            batch["token_type_ids"] = torch.from_numpy(types)
        return batch

    @staticmethod
    def _check(window: Window, output: Tensor) -> None:
        bad = ~output.isfinite().all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(f"model: expected finite numbers, got others for {window.places[row]}")
