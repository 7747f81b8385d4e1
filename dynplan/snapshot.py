"""Whether a model is as it was: the one question that every fast way through it asks before a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dynplan._C import attributes_are, entries_are, sizes_are, types_are

# What kernels read of a module besides its children and tensors, wherever a module has it.
_NUMBERS = (
    "eps",
    "normalized_shape",
    "max_norm",
    "padding_idx",
    "approximate",
    "act",
    "num_attention_heads",
    "attention_head_size",
    "scaling",
    "is_causal",
    "config",
)
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
# What the modules that the kernels stand for call, as PyTorch has it.
_FUNCTIONS = {
    name: getattr(F, name)
    for name in ("linear", "layer_norm", "embedding", "gelu", "relu", "silu", "scaled_dot_product_attention")
}


class ModuleSnapshot:
    """What modules were when they were looked at: never their own copy, only who and what they were.

    Seen is another class, another method of it, a hook or none, another child, parameter or buffer, another
    attribute that a forward reads, and any attribute more or less; contents of tensors are the business of
    :class:`~dynplan.ops.packed_weights.Watched`.

    Args:
        modules: those that the kernels stand for.
        entries: of other dictionaries, which shall hold what they hold now.
    """

    def __init__(self, modules: Iterable[nn.Module], entries: Iterable[tuple[dict, str]] = ()) -> None:
        modules = tuple(modules)
        self._modules = modules
        self._types = tuple(map(type, modules))
        kinds = set(self._types)
        names = [(kind, name) for kind in kinds for name in ("__call__", *dict(methods_of(kind)))]
        self._kinds, self._methods = zip(*names, strict=True)
        self._code = tuple(getattr(kind, name) for kind, name in names)
        entries = [*entries, *((vars(F), name) for name in _FUNCTIONS)]
        sized = [*_GLOBAL_HOOKS]
        for module in modules:
            own = vars(module)
            entries += [(own, name) for name in _NUMBERS if name in own]
            entries.append((own, "forward"))
            if isinstance(module, nn.Dropout) or "attention_head_size" in own:
                entries.append((own, "training"))
            for table in (own["_modules"], own["_parameters"], own["_buffers"]):
                entries += [(table, name) for name in table]
            for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
                entries += [(hooks, key) for key in hooks]
                sized.append(hooks)
            sized.append(own)
            if isinstance(module, nn.ModuleList):
                sized.append(own["_modules"])
        self._tables, self._names = zip(*entries, strict=True)
        self._values = tuple(table.get(name) for table, name in entries)
        self._sized = tuple(sized)
        self._sizes = tuple(map(len, sized))

    def holds(self) -> bool:
        """Whether all is as it was."""
        return (
            types_are(self._modules, self._types)
            and sizes_are(self._sized, self._sizes)
            and entries_are(self._tables, self._names, self._values)
            and attributes_are(self._kinds, self._methods, self._code)
        )


def own_forward(module: object, kind: type | None, hooked: bool = False) -> bool:
    """Whether calling ``module`` does what the class ``kind`` says, as its library wrote it; with ``hooked``,
    hooks aside."""
    if type(module) is not kind or not isinstance(module, nn.Module):
        return False
    methods = dict(methods_of(kind))
    return (
        "forward" not in vars(module)
        and vars(module).keys().isdisjoint(methods)
        and all(map(is_library_code, (*methods.values(), kind.__call__)))
        and (hooked or not has_hooks(module))
    )


def methods_of(kind: type) -> Iterable[tuple[str, object]]:
    """A class's own methods, public ones."""
    return ((name, value) for name, value in vars(kind).items() if callable(value) and name[0] != "_")


def is_library_code(function: object) -> bool:
    """Whether a function is of PyTorch, transformers or PEFT, and so is all that it wraps.

    ``functools.wraps`` gives a function the name and module of another, but not its globals.
    """
    function = getattr(function, "__func__", function)
    while function is not None:
        home = getattr(function, "__globals__", {}).get("__name__", function.__module__) or ""
        if home.partition(".")[0] not in ("torch", "transformers", "peft", "functools"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def process_reason() -> str | None:
    """What in this process stands between the modules and what they usually compute; None: nothing."""
    if any(_GLOBAL_HOOKS):
        return "a hook hangs on all modules"
    for name, function in _FUNCTIONS.items():
        if getattr(F, name) is not function or not is_library_code(function):
            return f"torch.nn.functional.{name} is not PyTorch's own"
    return None


def mode_reason() -> str | None:
    """As :func:`process_reason`, for what comes and goes between two forwards; asked before each."""
    if torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients are recorded"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook hangs on the calls of ``module``, :func:`capturing_hooks` aside: they sleep until the
    model's own forward wakes them."""
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return hooks > len(capturing_hooks(module))


def capturing_hooks(module: nn.Module) -> list[Callable]:
    """Those that transformers leaves on a module after a forward with ``output_hidden_states``."""
    home = "transformers.utils.output_capturing"
    return [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) == home]


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a hook waits for ``module``'s gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)
