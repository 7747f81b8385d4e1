"""Whether a model is as it was: the one question that every fast way through it asks before a forward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as torch_module

from dynplan._C import entries_are, sizes_are, types_are

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
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


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
        self._methods = [
            (table, name, method)
            for table in map(vars, set(self._types))
            for name, method in table.items()
            if callable(method) and (name == "__call__" or name[0] != "_")
        ]
        entries = list(entries)
        sized = [*_GLOBAL_HOOKS]
        for module in modules:
            own = vars(module)
            entries += [(own, name) for name in _NUMBERS if name in own]
            if isinstance(module, nn.Dropout) or "attention_head_size" in own:
                entries.append((own, "training"))
            for table in (own["_modules"], own["_parameters"], own["_buffers"]):
                entries += [(table, name) for name in table]
            sized += [own, own["_forward_hooks"], own["_forward_pre_hooks"]]
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
            and all(table.get(name) is method for table, name, method in self._methods)
        )


def own_forward(module: object, kind: type | None, hooked: bool = False) -> bool:
    """Whether calling ``module`` does what the class ``kind`` says, as its library wrote it; with ``hooked``,
    hooks aside."""
    if type(module) is not kind or not isinstance(module, nn.Module):
        return False
    methods = {name: value for name, value in vars(kind).items() if callable(value) and name[0] != "_"}
    return (
        "forward" not in vars(module)
        and vars(module).keys().isdisjoint(methods)
        and all(method.__module__ == kind.__module__ for method in methods.values())
        and (hooked or not has_hooks(module))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook hangs on the calls of ``module``, those aside that transformers leaves there after a
    forward with ``output_hidden_states``: they sleep until its own forward wakes them."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def has_global_hooks() -> bool:
    """Whether a hook hangs on the calls of all modules there are."""
    return any(_GLOBAL_HOOKS)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a hook waits for ``module``'s gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)
