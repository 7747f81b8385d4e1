"""Code of one's own in a model: subclasses, patched forwards, patched classes."""

import copy
import types

import torch
from integrations.change import add, ask, change, encoder_of, layers, part, put
from torch import nn

DENSE = "encoder.layer.1.output.dense"
NORM = "encoder.layer.1.output.LayerNorm"
SELF = "encoder.layer.1.attention.self"

# Parts of the model, and whether a swapped one may refuse code of their own: those that take all of a padded
# batch, with its mask.
PARTS = {
    "": False,
    "base": True,
    "embeddings": False,
    "encoder": True,
    "encoder.layer.1": True,
    "encoder.layer.1.attention": True,
    SELF: True,
    "encoder.layer.1.attention.output": True,
    "encoder.layer.1.intermediate": True,
    "encoder.layer.1.output": True,
    "pooler": False,
    DENSE: False,
    f"{SELF}.query": False,
    NORM: False,
    "encoder.layer.1.intermediate.intermediate_act_fn": False,
    "encoder.layer.1.output.dropout": False,
    "embeddings.word_embeddings": False,
    "embeddings.LayerNorm": False,
    "embeddings.dropout": False,
}


def at(model, path):
    return encoder_of(model) if path == "base" else part(model, path)


def task_of(path):
    return "ForSequenceClassification" if path.startswith("pooler") else "ForTokenClassification"


def blurred(value):
    """Not a multiple of the value, which a norm would undo."""
    return value + 0.5 * value.roll(1, -1)


def altered(output):
    """Another output, whatever its form."""
    if isinstance(output, torch.Tensor):
        return blurred(output)
    if isinstance(output, tuple):
        return (blurred(output[0]), *output[1:])
    output = copy.copy(output)
    name = next(iter(output))
    output[name] = blurred(output[name])
    return output


def with_own_forward(cls):
    """A subclass that alters what its base gives."""

    def forward(self, *args, **kwargs):
        return altered(cls.forward(self, *args, **kwargs))

    return type(f"Altered{cls.__name__}", (cls,), {"forward": forward})


def reclassed(path):
    def apply(model):
        module = at(model, path)
        module.__class__ = with_own_forward(type(module))

    return apply


def replaced(path):
    def apply(model):
        module = copy.copy(at(model, path))
        module.__class__ = with_own_forward(type(module))
        if path == "base":
            vars(module).pop("forward", None)  # that of the module it was
            setattr(model, model.base_model_prefix, module)
        else:
            put(model, path, module)

    return apply


def patched(path):
    def apply(model):
        module = at(model, path)
        before = module.forward
        module.forward = lambda *args, **kwargs: altered(before(*args, **kwargs))

    return apply


def patched_class(path):
    def apply(model):
        cls = type(at(model, path))
        before, own = cls.forward, "forward" in vars(cls)
        cls.forward = lambda self, *args, **kwargs: altered(before(self, *args, **kwargs))
        try:
            yield
        finally:
            if own:
                cls.forward = before
            else:
                del cls.forward

    return apply


for _path, _may_refuse in PARTS.items():
    _options = dict(may_refuse=_may_refuse, task=task_of(_path), sweep=True)
    _word = _path or "model"
    add(f"class-of-{_word}", reclassed(_path), **_options)
    add(f"forward-of-{_word}", patched(_path), **_options)
    add(f"forward-of-the-class-of-{_word}", patched_class(_path), **_options)
    if _path:
        add(f"subclass-in-place-of-{_word}", replaced(_path), **_options)


@change("method-type-in-place-of-a-linear-forward")
def _(model):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)

    module = part(model, DENSE)
    module.forward = types.MethodType(forward, module)


@change("forward-patched-and-put-back", visible=False)
def _(model):
    module = part(model, DENSE)
    module.forward = lambda x: 2 * type(module).forward(module, x)
    ask(model)
    del module.forward


@change("feed-forward-chunk-overridden", may_refuse=True)
def _(model):
    layer = layers(model)[1]
    layer.feed_forward_chunk = lambda states: 1.5 * type(layer).feed_forward_chunk(layer, states)


@change("feed-forward-in-chunks", visible=False)
def _(model):
    for layer in layers(model):
        layer.chunk_size_feed_forward = 1
