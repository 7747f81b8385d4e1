"""Hugging Face's own forward: eager attention, fused attention, and torch.compile on top."""

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from workloads import Batch, Model

from engines import Engine


class HuggingFaceEager(Engine):
    """``AutoModel`` with attention written out."""

    modules = ("torch", "transformers.models.bert.modeling_bert")
    attention: ClassVar[str] = "eager"

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModel.from_pretrained(
            model.folder, dtype=torch.float32, attn_implementation=self.attention, add_pooling_layer=False
        ).eval()

    def prepare(self, batch: Batch) -> Any:
        import torch

        # A user's collator gives no mask worth looking at where nothing is padded, but it gives one.
        return {"input_ids": torch.from_numpy(batch.ids), "attention_mask": torch.from_numpy(batch.mask)}

    def forward(self, inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(**inputs).last_hidden_state

    def hidden(self, output: Any, batch: Batch) -> np.ndarray:
        return output.numpy()


class HuggingFaceSdpa(HuggingFaceEager):
    """``AutoModel`` as it comes: scaled_dot_product_attention."""

    attention = "sdpa"


class Compiled(HuggingFaceSdpa):
    """torch.compile with dynamic shapes and frozen weights, which lets Inductor lay them out for oneDNN."""

    modules = (*HuggingFaceSdpa.modules, "torch._inductor.compile_fx")
    specialises = True

    @classmethod
    def obstacle(cls) -> str | None:
        if shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++"):
            return None
        return "no C++ compiler found, which torch.compile needs: install g++, or set CXX"

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        super().__init__(model, folder, threads)
        import torch
        from torch._inductor import config

        config.freezing = True
        self.compiled = torch.compile(self.model, dynamic=True)

    def forward(self, inputs: Any) -> Any:
        import torch

        with torch.no_grad():  # freezing is refused under inference_mode
            return self.compiled(**inputs).last_hidden_state
