"""Hooks: on every submodule of a layer, on what surrounds the layers, and on all modules at once."""

import torch
from integrations.change import add, ask, change, layers, part
from integrations.changed_classes import altered, at, blurred, task_of
from torch import nn
from torch.nn.modules import module as everywhere

LAYER = "encoder.layer.1"
# What a swapped model may refuse a hook on: what takes all of a padded batch, with its mask.
ON_PADDED = ("encoder", LAYER, f"{LAYER}.attention", f"{LAYER}.attention.self")
PATHS = (
    "",
    "base",
    "embeddings",
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
    "embeddings.LayerNorm",
    "embeddings.dropout",
    "encoder",
    "encoder.layer",
    LAYER,
    f"{LAYER}.attention",
    f"{LAYER}.attention.self",
    f"{LAYER}.attention.self.query",
    f"{LAYER}.attention.self.key",
    f"{LAYER}.attention.self.value",
    f"{LAYER}.attention.self.dropout",
    f"{LAYER}.attention.output",
    f"{LAYER}.attention.output.dense",
    f"{LAYER}.attention.output.dropout",
    f"{LAYER}.attention.output.LayerNorm",
    f"{LAYER}.intermediate",
    f"{LAYER}.intermediate.dense",
    f"{LAYER}.intermediate.intermediate_act_fn",
    f"{LAYER}.output",
    f"{LAYER}.output.dense",
    f"{LAYER}.output.dropout",
    f"{LAYER}.output.LayerNorm",
    "pooler",
    "pooler.dense",
    "pooler.activation",
    "dropout",
    "classifier",
)
NEVER_CALLED = ("encoder.layer", f"{LAYER}.attention.self.dropout")
# Called with keyword arguments alone, which a pre-hook without them does not see.
BY_KEYWORD = ("", "embeddings")


def changed_input(value):
    """Another value of the same form; ids become 0 and 1, which every table holds."""
    return blurred(value) if value.is_floating_point() else 1 - value.clamp(max=1)


def hook(module, args, output):
    return altered(output)


def hook_with_kwargs(module, args, kwargs, output):
    return altered(output)


def pre_hook(module, args):
    return (changed_input(args[0]), *args[1:]) if args else None


def pre_hook_with_kwargs(module, args, kwargs):
    if args:
        return (changed_input(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: changed_input(kwargs[first])}


HOOKS = {
    "hook": lambda module: module.register_forward_hook(hook),
    "hook-with-kwargs": lambda module: module.register_forward_hook(hook_with_kwargs, with_kwargs=True),
    "pre-hook": lambda module: module.register_forward_pre_hook(pre_hook),
    "pre-hook-with-kwargs": lambda module: module.register_forward_pre_hook(
        pre_hook_with_kwargs, with_kwargs=True
    ),
}


def hooked(path, register):
    def apply(model):
        register(at(model, path))

    return apply


for _path in PATHS:
    for _word, _register in HOOKS.items():
        add(
            f"{_word}-on-{_path or 'model'}",
            hooked(_path, _register),
            may_refuse=_path in ON_PADDED,
            visible=_path not in NEVER_CALLED and not (_word == "pre-hook" and _path in BY_KEYWORD),
            task=task_of(_path),
            sweep=True,
        )


@change("hook-put-on-and-taken-off", visible=False)
def _(model):
    handles = [module.register_forward_hook(hook) for module in layers(model)[1].modules()]
    ask(model)
    for handle in handles:
        handle.remove()


@change("hooks-on-all-layers-norms")
def _(model):
    for module in layers(model).modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(hook)


@change("hook-that-writes-its-output-in-place")
def _(model):
    def write(module, args, output):
        output.mul_(2)

    part(model, f"{LAYER}.output.dense").register_forward_hook(write)


@change("hook-that-only-looks", visible=False)
def _(model):
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: None)


@change("hook-on-all-modules-of-the-process")
def _(model):
    def on_norms(module, args, output):
        return blurred(output) if isinstance(module, nn.LayerNorm) else None

    handle = everywhere.register_module_forward_hook(on_norms)
    yield
    handle.remove()


@change("pre-hook-on-all-modules-of-the-process")
def _(model):
    def on_linears(module, args):
        return (blurred(args[0]),) if type(module) is nn.Linear else None

    handle = everywhere.register_module_forward_pre_hook(on_linears)
    yield
    handle.remove()


@change("hook-on-all-modules-that-only-looks", visible=False)
def _(model):
    handle = everywhere.register_module_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


@change("backward-hooks", visible=False)
def _(model):
    for module in layers(model)[1].modules():
        module.register_full_backward_hook(lambda module, given, taken: None)
    part(model, "embeddings").register_full_backward_pre_hook(lambda module, given: None)


@change("backward-hook-on-all-modules", visible=False)
def _(model):
    handle = everywhere.register_module_full_backward_hook(lambda module, given, taken: None)
    yield
    handle.remove()


@change("state-dict-hooks", visible=False)
def _(model):
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    model.register_load_state_dict_post_hook(lambda module, keys: None)


@change("hooks-of-output-hidden-states", visible=False)
def _(model):
    """Hugging Face leaves hooks of its own on the layers once hidden states were asked for."""
    from integrations.models import batch

    with torch.no_grad():
        model(**batch((3, 2)), output_hidden_states=True)


@change("hook-on-embeddings-that-asks-for-gradients", visible=False)
def _(model):
    model.enable_input_require_grads()


@change("tensor-hooks-on-parameters", visible=False)
def _(model):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient)
