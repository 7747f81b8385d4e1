"""dynplan: a swapped Hugging Face model, every layer kept or a random path for each sample."""

from pathlib import Path

import numpy as np
from workloads import Batch, Model

from engines.torch_engines import HuggingFaceSdpa


class Dynplan(HuggingFaceSdpa):
    """fp32."""

    modules = (*HuggingFaceSdpa.modules, "dynplan")
    padding_free = True
    variants = (1.0, 0.75, 0.5, 0.25)

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        super().__init__(model, folder, threads)
        import dynplan

        dynplan.swap(self.model)

    def choose(self, share: float) -> None:
        from dynplan.policies import KeepAll, RandomPath

        self.model.dynplan.policy = KeepAll() if share == 1 else RandomPath(share)

    def plan(self, batch: Batch) -> np.ndarray:
        return self.model.dynplan.last_plan.numpy()
