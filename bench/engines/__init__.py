"""Engines that run a BERT-family encoder on a CPU, behind one small interface.

``ENGINES`` names them all. Each is imported only in the process that runs it, so that one engine's libraries
and memory are not counted against another.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from workloads import Batch, Model


class Engine:
    """One way to run an encoder; a subclass per engine.

    Attributes:
        modules: what a forward needs; imported before memory is counted.
        converters: what :meth:`convert` needs besides.
        precision: ``fp32``, ``bf16`` or ``int8``, of the weights' products.
        variants: shares of layers kept that the engine can be set to; 1.0 is all it does if alone.
        padding_free: computes only real tokens, whatever the order of the sentences.
        specialises: compiles per input shape, so that every shape has to be met before timing.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    converters: ClassVar[tuple[str, ...]] = ()
    precision: ClassVar[str] = "fp32"
    variants: ClassVar[tuple[float, ...]] = (1.0,)
    padding_free: ClassVar[bool] = False
    specialises: ClassVar[bool] = False

    @classmethod
    def obstacle(cls) -> str | None:
        """Why this engine cannot run here, in words for the table; None if it can."""
        if all(importlib.util.find_spec(module) for module in (*cls.modules, *cls.converters)):
            return None
        return "not installed: pip install dynplan[compare]"

    @classmethod
    def convert(cls, model: Model, folder: Path) -> None:
        """Write the engine's own form of the model into ``folder``, which is kept between runs."""

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        """Load the model; ``folder`` is what :meth:`convert` was given."""

    def choose(self, share: float) -> None:
        """Run with this share of the layers from now on; one of :attr:`variants`."""

    def prepare(self, batch: Batch) -> Any:
        """The batch as the engine takes it; not timed."""
        return batch

    def forward(self, inputs: Any) -> Any:
        """Timed: prepared batch to last hidden states, in the engine's own form."""
        raise NotImplementedError(f"{type(self).__name__}: expected forward() to be defined by the engine")

    def hidden(self, output: Any, batch: Batch) -> np.ndarray:
        """Last hidden states (B, S, H) float32 of :meth:`forward`'s output; not timed."""
        return np.asarray(output)

    def plan(self, batch: Batch) -> np.ndarray | None:
        """bool (B, L): layers taken in the last forward; None: all."""
        return None


ENGINES = {
    "hf-eager": "torch_engines.HuggingFaceEager",
    "hf-sdpa": "torch_engines.HuggingFaceSdpa",
    "torch.compile": "torch_engines.Compiled",
    "onnxruntime": "onnx_engines.OnnxRuntime",
    "onnxruntime-int8": "onnx_engines.OnnxRuntimeInt8",
    "openvino": "onnx_engines.OpenVino",
    "ctranslate2": "ctranslate2_engine.CTranslate2",
    "dynplan": "dynplan_engine.Dynplan",
    "dynplan-int8": "dynplan_engine.DynplanInt8",
    "dynplan-bf16": "dynplan_engine.DynplanBFloat16",
}


def engine_class(name: str) -> type[Engine]:
    """The class of the engine ``name``; its libraries are imported only when an instance is made."""
    module, cls = ENGINES[name].split(".")
    return getattr(importlib.import_module(f"engines.{module}"), cls)
