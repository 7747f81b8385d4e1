"""Policies and planners on disk, beside Hugging Face's own files.

``dynplan.json`` describes policy and budget; ``dynplan.safetensors`` holds a planner's weights, and the
description holds their SHA-256, so that the two cannot be mixed up. Each file is written whole under another
name and then moved. Hugging Face's loaders do not look at either: for them the folder holds the unmodified
model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from dynplan.integrations.huggingface.controller import Controller
from dynplan.policies import Policy, check_budget, policy_from_config

DESCRIPTION = "dynplan.json"
WEIGHTS = "dynplan.safetensors"
_FORMAT = 1


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


def save_policy(folder: str | os.PathLike, policy: Policy, budget: float | None = None) -> None:
    """Write ``dynplan.json`` and, where the policy has a planner, ``dynplan.safetensors``.

    Args:
        folder: exists.
        policy: described by its ``to_config``.
        budget: the model's budget, None or 0..1.
    """
    folder = Path(folder)
    planner = getattr(policy, "planner", None)
    description = {"format": _FORMAT, "policy": policy.to_config(), "budget": budget, "weights_sha256": None}
    if planner is not None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in planner.state_dict().items()}
        weights = safetensors.torch.save(state)
        description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    if planner is not None:
        _write(folder / WEIGHTS, weights)
    _write(folder / DESCRIPTION, text.encode())
    if planner is None:
        (folder / WEIGHTS).unlink(missing_ok=True)


def load_policy(folder: str | os.PathLike) -> tuple[Policy, float | None]:
    """Read what :func:`save_policy` wrote.

    Returns:
        The policy, its planner on the CPU and in the dtype it was saved in; and the model's budget.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another format, or the two do not belong together.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"load_policy: expected {DESCRIPTION} in {folder}, got none; "
            "load the model with transformers and call dynplan.swap(model, policy)"
        )
    try:
        description = json.loads(path.read_text())
        form = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_policy: expected {path} to be a dynplan description, got {error}") from error
    if form != _FORMAT:
        raise ValueError(f"load_policy: expected format {_FORMAT} in {path}, got {form}; update dynplan")
    policy = policy_from_config(description["policy"])
    planner = getattr(policy, "planner", None)
    if planner is not None:
        _load_weights(planner, folder / WEIGHTS, description["weights_sha256"])
    budget = description["budget"]
    return policy, None if budget is None else check_budget("load_policy", budget)


def _load_weights(planner: nn.Module, path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"load_policy: expected the planner's weights in {path}, got no such file")
    weights = path.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != expected:
        raise ValueError(
            f"load_policy: expected {path} to have SHA-256 {expected}, got {found}; "
            f"it was not saved together with {DESCRIPTION}"
        )
    try:
        planner.load_state_dict(safetensors.torch.load(weights), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"load_policy: expected weights of {type(planner).__name__} in {path}: {error}"
        ) from error


def _write(path: Path, content: bytes) -> None:
    """Write so that ``path`` holds either what it held before or all of ``content``."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; a saved model is as readable as its neighbours.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
