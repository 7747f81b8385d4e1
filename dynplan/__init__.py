"""dynplan: fused per-sample layer dispatch for BERT-family encoders, and a fused region loss."""

import importlib
from typing import TYPE_CHECKING, Any

from dynplan import _library, nn, ops, policies
from dynplan.stream_budget import StreamBudget

if TYPE_CHECKING:
    from dynplan.cuda_graph import capture
    from dynplan.integrations.huggingface.onnx import export_onnx
    from dynplan.integrations.huggingface.swap import from_pretrained, swap, unswap

__version__ = _library.build_info()["version"]
__all__ = [
    "StreamBudget",
    "capture",
    "export_onnx",
    "from_pretrained",
    "nn",
    "ops",
    "policies",
    "swap",
    "unswap",
]

# Loaded on first use: transformers takes longer to import than all of dynplan.
_LAZY = {
    "capture": "dynplan.cuda_graph",
    "export_onnx": "dynplan.integrations.huggingface.onnx",
    "from_pretrained": "dynplan.integrations.huggingface.swap",
    "swap": "dynplan.integrations.huggingface.swap",
    "unswap": "dynplan.integrations.huggingface.swap",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dynplan' has no attribute {name!r}")
