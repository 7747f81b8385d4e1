"""CTranslate2's encoder, which removes padding on the CPU as dynplan does."""

from pathlib import Path
from typing import Any

import numpy as np
from workloads import Batch, Model

from engines import Engine


class CTranslate2(Engine):
    """fp32."""

    modules = ("ctranslate2",)
    padding_free = True

    @classmethod
    def convert(cls, model: Model, folder: Path) -> None:
        import ctranslate2

        ctranslate2.converters.TransformersConverter(str(model.folder)).convert(str(folder), force=True)

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        import ctranslate2

        self.encoder = ctranslate2.Encoder(
            str(folder), compute_type="float32", intra_threads=threads, inter_threads=1
        )

    def prepare(self, batch: Batch) -> Any:
        return [ids[mask.astype(bool)].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]

    def forward(self, inputs: Any) -> Any:
        return self.encoder.forward_batch(inputs)

    def hidden(self, output: Any, batch: Batch) -> np.ndarray:
        return np.array(output.last_hidden_state)
