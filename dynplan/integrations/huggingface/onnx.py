"""``export_onnx``: a model as an ONNX file, with the layers of one path."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.integrations.huggingface.swap import find_encoder, unswap
from dynplan.policies import FixedPath, KeepAll, PlanRequest, StaticPath

_ONE_PATH = (KeepAll, FixedPath, StaticPath)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    keep: Tensor | Sequence[bool] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Write a model to an ONNX file: the original's own modules, with the layers of one path for all samples.

    ONNX has no op for samples that each take a path of their own. Batch and length stay dynamic; padding
    positions hold what the original computes there.

    Args:
        model: swapped or not, of a class that :func:`dynplan.swap` takes. It is not changed.
        path: of the file.
        keep: bool ``(L,)``, the layers to keep; None: what the model's policy keeps, if that is one path for
            all (KeepAll, StaticPath, FixedPath of one dimension), and all layers of a model not swapped.
        inputs: name -> tensor ``(B, S)`` with ``B, S > 1``, examples of all inputs that the file shall take;
            by default integer ``input_ids`` and ``attention_mask``.
        **options: for ``torch.onnx.export`` (``opset_version``, ``optimize``, ``output_names``, ...).

    Returns:
        What ``torch.onnx.export`` does.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        NotImplementedError: the model's policy may give samples different paths, and ``keep`` is None.
        TypeError, ValueError: a model or a path that does not fit.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx: {' and '.join(missing)} not installed; run: pip install dynplan[onnx]"
        )
    bare, family, _ = find_encoder("export_onnx", model)
    if family.shared:
        raise NotImplementedError(
            f"export_onnx: expected a model with a module for each layer, got {type(bare).__name__}, whose "
            "layers share theirs"
        )
    layers = family.layers_of(bare)
    kept = _kept(model, bare, len(layers), keep)
    if inputs is None:
        ids = torch.full((2, 8), min(5, bare.config.vocab_size - 1), device=bare.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    original = copy.deepcopy(model)
    if "dynplan" in vars(original):
        unswap(original)
    bare = find_encoder("export_onnx", original)[0]
    owner, _, name = family.layers.rpartition(".")
    chosen = [layer for layer, wanted in zip(family.layers_of(bare), kept, strict=True) if wanted]
    setattr(bare.get_submodule(owner), name, nn.ModuleList(chosen))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    settings = {
        "input_names": list(inputs),
        "dynamic_shapes": {name: {0: batch, 1: length} for name in inputs},
        "dynamo": True,
    }
    return torch.onnx.export(original.eval(), (), path, kwargs=dict(inputs), **{**settings, **options})


def _kept(model: nn.Module, bare: nn.Module, layers: int, keep: Tensor | Sequence[bool] | None) -> list[bool]:
    policy = KeepAll() if keep is None else FixedPath(keep)
    budget = None
    if keep is None and "dynplan" in vars(model):
        policy, budget = model.dynplan.policy, model.dynplan.budget
    if type(policy) not in _ONE_PATH or getattr(policy, "kept", torch.empty(0)).dim() > 1:
        raise NotImplementedError(
            f"export_onnx: expected one path for all samples, got {policy!r}; give keep, bool ({layers},), "
            "or use torch.export, which holds per-sample paths"
        )
    nothing = torch.empty(0, 0)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    return policy.plan(PlanRequest(1, layers, nothing, offsets, budget))[0].tolist()
