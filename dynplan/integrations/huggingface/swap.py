"""``swap``, ``unswap`` and ``from_pretrained``: Hugging Face encoders under a dynplan policy, and back.

The forward of one *instance* of the bare encoder is replaced; its class, modules, parameters and
``state_dict`` stay as they are. :data:`~dynplan.integrations.huggingface.families.FAMILIES` is the whole list
of what is supported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin

from dynplan.integrations.huggingface.controller import Controller
from dynplan.integrations.huggingface.families import (
    FAMILIES,
    READS,
    Family,
    find_class,
    find_family,
)
from dynplan.integrations.huggingface.forward import SwappedForward
from dynplan.integrations.sentence_transformers import encoder_inside, is_folder_of, load
from dynplan.loading import check_config
from dynplan.ops.reduced_encoder import REDUCED_DTYPES
from dynplan.policies import KeepAll, Policy
from dynplan.policy_files import DESCRIPTION, load_policy, save_policy


def swap(model: nn.Module, policy: Policy | None = None, *, weights: str | None = None) -> nn.Module:
    """Put a Hugging Face encoder under a policy, in place.

    Args:
        model: an encoder of a family that dynplan knows, bare or with any head that generates no text; or a
            ``SentenceTransformer`` or ``CrossEncoder`` round one, in which the encoder is swapped. For
            another model with such an encoder inside, swap the bare encoder.
        policy: decides the plans; :class:`~dynplan.policies.KeepAll` by default.
        weights: "int8" or "bfloat16": the encoder's products run on copies of its weights in that type, see
            :func:`~dynplan.ops.pack_reduced_encoder_weights`. CPU and inference only: other forwards are
            refused. The model's own weights stay, for ``state_dict`` and :func:`unswap`.

    Returns:
        ``model``; ``model.dynplan`` is its :class:`~dynplan.integrations.huggingface.controller.Controller`.

    Raises:
        TypeError: an unknown model type or class.
        NotImplementedError: an architecture that is not supported, with the reason.
        ValueError: the model is swapped already; ``weights`` is unknown or not for the model's device or
            dtype.
    """
    if (inside := encoder_inside(model)) is not None:
        return _swap_inside(model, *inside, policy, weights)
    return _swap(model, policy, weights)


def _swap(
    model: nn.Module, policy: Policy | None, weights: str | None, reads: str | None = None
) -> nn.Module:
    bare, family, suffix = find_encoder("swap", model)
    if reads is None:
        reads = "tokens" if bare is model else READS.get(suffix, "all")
    if isinstance(vars(bare).get("forward"), SwappedForward):
        raise ValueError(
            "swap: expected a model that is not swapped, got one that is; "
            "set model.dynplan.policy, or call dynplan.unswap(model) first"
        )
    if "forward" in vars(bare):
        raise ValueError(
            f"swap: expected {type(bare).__name__} with its class's forward, got one already patched"
        )
    for name in ("dynplan", "save_pretrained"):
        if name in vars(model):
            raise ValueError(f"swap: expected {type(model).__name__} without an attribute {name}, got one")
    if weights is not None:
        _check_weights(bare, family, weights)
    controller = Controller(bare, family, KeepAll() if policy is None else policy, weights, model)
    refused = controller.state().why_refused
    if refused is not None:
        raise NotImplementedError(f"swap: {refused}")
    bare.forward = SwappedForward(bare, family, controller, reads)
    model.dynplan = controller
    model.save_pretrained = SwappedSave(model, controller)
    return model


def _swap_inside(
    model: nn.Module, inner: nn.Module, reads: str, policy: Policy | None, weights: str | None
) -> nn.Module:
    if "dynplan" in vars(model):
        raise ValueError(f"swap: expected {type(model).__name__} without an attribute dynplan, got one")
    headless = find_encoder("swap", inner)[0] is inner
    _swap(inner, policy, weights, reads if headless or reads == "all" else None)
    model.dynplan = inner.dynplan
    return model


def unswap(model: nn.Module) -> nn.Module:
    """Give back the original model, in place: what :func:`swap` set is removed, nothing else was changed.

    Args:
        model: what :func:`swap` returned.

    Returns:
        ``model``.

    Raises:
        TypeError: an unknown model type or class.
        ValueError: the model is not swapped, or another library has wrapped its forward since.
    """
    if (inside := encoder_inside(model)) is not None:
        unswap(inside[0])
        vars(model).pop("dynplan", None)
        return model
    bare, _, _ = find_encoder("unswap", model)
    if "dynplan" not in vars(model):
        inside = " though its encoder is" if isinstance(vars(bare).get("forward"), SwappedForward) else ""
        raise ValueError(f"unswap: expected the model that was swapped, got one that was not{inside}")
    if not isinstance(vars(bare).get("forward"), SwappedForward):
        raise ValueError(
            f"unswap: expected the forward of {type(bare).__name__} as swap left it, got one that another "
            "library has wrapped; undo that first"
        )
    del bare.forward, model.dynplan, model.save_pretrained
    return model


def from_pretrained(folder: str | os.PathLike, *, weights: str | None = None, **options: Any) -> nn.Module:
    """Load a swapped model that ``save_pretrained`` wrote: weights, policy, planner and budget.

    Args:
        folder: a local folder.
        weights: for :func:`swap`. It is not saved with the model: it suits the machine that runs it.
        **options: for the model class's own ``from_pretrained`` (``dtype``, ``device_map``, ...), or for the
            class of sentence-transformers.

    Returns:
        The swapped model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or the model in it was not saved swapped.
        ValueError: the policy's files are damaged, or the config asks for what no model has.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"from_pretrained: expected a local folder, got {str(folder)!r}")
    policy, budget = load_policy(folder)
    if is_folder_of(folder):
        model = swap(load(folder, **options), policy, weights=weights)
        _check_fit(encoder_inside(model)[0], folder)
        model.dynplan.budget = budget
        return model
    config = transformers.AutoConfig.from_pretrained(folder)
    check_config(folder, config)
    names = config.architectures or ["none"]
    model_class = getattr(transformers, str(names[0]), None) or find_class(str(names[0]))
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"from_pretrained: expected a model class of transformers in config.json, got {names[0]}"
        )
    model = swap(model_class.from_pretrained(folder, **options), policy, weights=weights)
    _check_fit(model, folder)
    model.dynplan.budget = budget
    return model


class SwappedSave:
    """Takes the place of ``model.save_pretrained`` on one instance: the original's work, then the policy's
    files.

    An object rather than a closure, so that deep copies and pickles of the model hold one of their own.

    Args:
        model: the swapped model.
        controller: holds what is to be saved.
    """

    def __init__(self, model: nn.Module, controller: Controller) -> None:
        self.model = model
        self.controller = controller

    def __call__(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **options: Any
    ) -> Any:
        """See ``transformers.PreTrainedModel.save_pretrained``.

        Raises:
            ValueError: ``push_to_hub=True``, which would upload before the policy's files are there.
        """
        if options.get("push_to_hub"):
            raise ValueError(
                "save_pretrained: expected push_to_hub=False on a swapped model, got True; "
                "use model.push_to_hub(...)"
            )
        result = type(self.model).save_pretrained(self.model, save_directory, is_main_process, **options)
        if is_main_process:
            save_policy(save_directory, self.controller.policy, self.controller.budget)
        return result


def _check_fit(model: nn.Module, folder: str | os.PathLike) -> None:
    planner = model.dynplan.planner
    for name, own in (("num_layers", model.dynplan.num_layers), ("hidden_size", model.config.hidden_size)):
        if getattr(planner, name, own) != own:
            raise ValueError(
                f"from_pretrained: expected a planner of {name} {own} in {folder}, "
                f"got {getattr(planner, name)}; {DESCRIPTION} belongs to another model"
            )


def find_encoder(caller: str, model: nn.Module) -> tuple[nn.Module, Family, str]:
    """The bare encoder, its family and the suffix of the model's class."""
    if isinstance(model, GenerationMixin):
        raise NotImplementedError(
            f"{caller}: expected an encoder, got {type(model).__name__}, which generates text: a causal mask "
            "would make each token's work depend on its place"
        )
    found = find_family(model)
    if found is None:
        known = ", ".join(f"{family.prefix}{family.bare}" for family in FAMILIES)
        inside = [(name, part) for name, part in model.named_modules() if name and find_family(part)]
        remedy = ""
        if inside:
            name, part = inside[0]
            remedy = (
                f"; it holds a {type(part).__name__}: dynplan.{caller}(model.get_submodule({name!r})) if "
                "what reads it ignores padding"
            )
        raise TypeError(
            f"{caller}: expected one of {known}, or one of these with a head, got "
            f"{type(model).__name__}{remedy}"
        )
    family, bare, suffix = found
    return bare, family, suffix


def _check_weights(bare: nn.Module, family: Family, weights: str) -> None:
    if weights not in REDUCED_DTYPES:
        raise ValueError(f"swap: expected weights to be None, bfloat16 or int8, got {weights!r}")
    if not family.has_kernels:
        raise ValueError(
            f"swap: expected weights=None for {type(bare).__name__}, whose layers the kernels do not know, "
            f"got {weights!r}"
        )
    parameter = next(bare.parameters())
    if parameter.device.type != "cpu" or parameter.dtype == torch.float64:
        raise ValueError(
            f"swap: expected weights=None for a model in {parameter.dtype} on {parameter.device}, got "
            f"{weights!r}; move it to the CPU or convert it first (model.float())"
        )
