"""dynplan: a swapped Hugging Face model, every layer kept or a random path for each sample."""

from pathlib import Path
from typing import ClassVar

import numpy as np
from workloads import Batch, Model

from engines.torch_engines import HuggingFaceSdpa


class Dynplan(HuggingFaceSdpa):
    """fp32."""

    modules = (*HuggingFaceSdpa.modules, "dynplan")
    padding_free = True
    variants = (1.0, 0.75, 0.5, 0.25)
    weights: ClassVar[str | None] = None

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        super().__init__(model, folder, threads)
        import dynplan

        dynplan.swap(self.model, weights=self.weights)

    def choose(self, share: float) -> None:
        from dynplan.policies import KeepAll, RandomPath

        self.model.dynplan.policy = KeepAll() if share == 1 else RandomPath(share)

    def plan(self, batch: Batch) -> np.ndarray:
        return self.model.dynplan.last_plan.numpy()


class DynplanInt8(Dynplan):
    """Products in int8: rows quantized as they come, weights by output channel."""

    precision = "int8"
    weights = "int8"


class DynplanBFloat16(Dynplan):
    """Products in bfloat16 where the CPU multiplies it, else bfloat16 weights in float32 products."""

    precision = "bf16"
    weights = "bfloat16"
