"""Policies and planners on disk, beside Hugging Face's own files.

``dynplan.json`` describes policy and budget; ``dynplan.safetensors`` holds a planner's weights, and the
description holds their SHA-256, so that the two cannot be mixed up. Each file is there whole or not at all.
Hugging Face's loaders do not look at either: for them the folder holds the unmodified model.

Both files may come from anywhere. What they say is checked before it is used: whatever they hold, the budget
stays a contract, and damage is a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dynplan.files import write_whole
from dynplan.policies import Policy, check_budget, policy_from_config
from dynplan.stream_budget import StreamBudget

DESCRIPTION = "dynplan.json"
WEIGHTS = "dynplan.safetensors"
_FORMAT = 1
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_policy(
    folder: str | os.PathLike, policy: Policy, budget: float | StreamBudget | None = None
) -> None:
    """Write ``dynplan.json`` and, where the policy has a planner, ``dynplan.safetensors``.

    Interrupted at any moment, the folder holds what it held before or the new policy.

    Args:
        folder: exists.
        policy: described by its ``to_config``.
        budget: the model's budget, None, 0..1 or a stream's, whose counts are not saved.
    """
    folder = Path(folder)
    if isinstance(budget, StreamBudget):
        budget = budget.to_config()
    planner = getattr(policy, "planner", None)
    description = {"format": _FORMAT, "policy": policy.to_config(), "budget": budget, "weights_sha256": None}
    weights = None
    if planner is not None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in planner.state_dict().items()}
        weights = safetensors.torch.save(state)
        description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    if weights is None:
        write_whole(folder / DESCRIPTION, text)
        (folder / WEIGHTS).unlink(missing_ok=True)
        return
    # The old weights stay beside the new ones until the description, replaced at one stroke, names the new.
    pending = _pending(folder, description["weights_sha256"])
    try:
        write_whole(pending, weights)
        write_whole(folder / DESCRIPTION, text)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    os.replace(pending, folder / WEIGHTS)
    for stale in folder.glob("dynplan-*.safetensors"):  # of a save that was killed
        stale.unlink()


def load_policy(folder: str | os.PathLike) -> tuple[Policy, float | StreamBudget | None]:
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
    description = _read_description(path)
    config, budget = description["policy"], description["budget"]
    try:
        policy = policy_from_config(config)
        if not _says_the_same(config, json.loads(json.dumps(policy.to_config()))):
            raise ValueError(f"expected what {type(policy).__name__} writes, got {config}")
        if isinstance(budget, dict):
            budget = StreamBudget(**budget)
        elif budget is not None:
            budget = check_budget("load_policy", budget)
    except Exception as error:  # constructors, a user's own among them, meet values of any kind here
        raise ValueError(f"load_policy: in {path}: {_shortened(error)}") from error
    planner = getattr(policy, "planner", None)
    if planner is not None:
        _load_weights(planner, folder, description["weights_sha256"])
    return policy, budget


def _read_description(path: Path) -> dict[str, Any]:
    """The four entries of ``dynplan.json``, policy a dict with a type; ValueError for anything else."""
    try:
        description = json.loads(
            path.read_bytes(), parse_int=_int64, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"load_policy: expected {path} to be a dynplan description, got {_shortened(error)}"
        ) from error
    wanted = ("format", "policy", "budget", "weights_sha256")
    if not isinstance(description, dict) or not all(key in description for key in wanted):
        raise ValueError(
            f"load_policy: expected {path} to be a dynplan description with {', '.join(wanted)}, "
            f"got {_shortened(description)}"
        )
    form, config = description["format"], description["policy"]
    if isinstance(form, bool) or form != _FORMAT:
        raise ValueError(
            f"load_policy: expected format {_FORMAT} in {path}, got {_shortened(form)}; update dynplan"
        )
    # Names with an underscore are parts of dynplan, not policies to be had by name.
    kind = config.get("type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind.startswith("_"):
        raise ValueError(f"load_policy: expected a policy with its type in {path}, got {_shortened(config)}")
    return description


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"an integer of more than 64 bits, {digits[:20]}...")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits[:20]}")
    return value


def _says_the_same(given: Any, built: Any) -> bool:
    """Whether every entry given came out as it was: nothing was cut, rounded or taken for another type."""
    if isinstance(given, dict) and isinstance(built, dict):
        return all(key in built and _says_the_same(value, built[key]) for key, value in given.items())
    if isinstance(given, list) and isinstance(built, list):
        return len(given) == len(built) and all(map(_says_the_same, given, built))
    # 1 and 1.0 are one number in JSON; True is none.
    return given == built and isinstance(given, bool) == isinstance(built, bool)


def _shortened(value: Any) -> str:
    """For a message: an error with its kind where that is the news, anything else as it is written."""
    if isinstance(value, Exception):
        text = str(value) if isinstance(value, ValueError) else f"{type(value).__name__}: {value}"
    else:
        text = repr(value)
    return text if len(text) <= 300 else text[:300] + "..."


def _pending(folder: Path, digest: str) -> Path:
    """Where weights stand until the description names them."""
    return folder / f"dynplan-{digest[:16]}.safetensors"


def _load_weights(planner: nn.Module, folder: Path, expected: Any) -> None:
    if not isinstance(expected, str):
        raise ValueError(
            f"load_policy: expected weights_sha256 in {folder / DESCRIPTION}, got {_shortened(expected)}"
        )
    places = [path for path in (folder / WEIGHTS, _pending(folder, expected)) if path.is_file()]
    if not places:
        raise FileNotFoundError(
            f"load_policy: expected the planner's weights in {folder / WEIGHTS}, got no such file"
        )
    for path in places:
        weights = path.read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found == expected:
            break
    else:
        raise ValueError(
            f"load_policy: expected {folder / WEIGHTS} to have SHA-256 {_shortened(expected)}, got {found}; "
            f"it was not saved together with {DESCRIPTION}"
        )
    try:
        state = safetensors.torch.load(weights)
        _check_tensors(planner, state)
        planner.load_state_dict(state, assign=True)
    except Exception as error:  # safetensors' own, and RuntimeError for names and shapes
        raise ValueError(
            f"load_policy: expected weights of {type(planner).__name__} in {path}: {_shortened(error)}"
        ) from error


def _check_tensors(planner: nn.Module, state: dict[str, Tensor]) -> None:
    """Names and shapes are load_state_dict's business; it looks neither at types nor at values."""
    own = planner.state_dict()
    taken: dict[torch.dtype, torch.dtype] = {}
    for name, tensor in state.items():
        if name not in own:
            continue
        dtype = own[name].dtype
        if not dtype.is_floating_point:
            fits = tensor.dtype == dtype
        else:  # a planner may be kept in another floating type, the whole of it
            fits = tensor.dtype in _FLOATS and taken.setdefault(dtype, tensor.dtype) == tensor.dtype
        if not fits:
            raise ValueError(f"{name} is {tensor.dtype}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinities")
