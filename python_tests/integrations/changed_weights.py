"""Changes to the numbers of a model's parameters, by every way that writes them."""

import copy
import os

import torch
from integrations.change import add, ask, change, encoder_of, layers, other, part, small
from torch import nn

DENSE = "encoder.layer.1.output.dense"
NORM = "encoder.layer.1.attention.output.LayerNorm"


def each(write, root=""):
    """``write`` on every parameter under ``root``."""

    def apply(model):
        with torch.no_grad():
            for parameter in part(model, root).parameters():
                write(parameter)

    return apply


def move(parameter):
    parameter.data = parameter.data * 1.3


def write_copy(parameter):
    parameter.data.copy_(parameter.data * 1.3)


def set_storage(parameter):
    parameter.set_(parameter.detach() * 1.3)


def write_numpy(parameter):
    parameter.detach().numpy()[...] *= 1.3


def write_storage(parameter):
    flat = torch.empty(0, dtype=parameter.dtype).set_(parameter.untyped_storage())
    flat.mul_(1.3)


def write_dlpack(parameter):
    torch.from_dlpack(parameter.detach()).mul_(1.3)


def swap_tensors(parameter):
    torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.3))


WRITES = {
    "data-mul": lambda p: p.data.mul_(1.3),
    "data-copy": write_copy,
    "data-assigned": move,
    "detach-mul": lambda p: p.detach().mul_(1.3),
    "set": set_storage,
    "numpy-view": write_numpy,
    "storage-view": write_storage,
    "dlpack-view": write_dlpack,
    "swap-tensors": swap_tensors,
    "no-grad-mul": lambda p: p.mul_(1.3),
    "no-grad-copy": lambda p: p.copy_(p * 1.3),
    "no-grad-index": lambda p: p.__setitem__(0, p[0] + 1),
    "no-grad-out": lambda p: torch.mul(p, 1.3, out=p),
}
for _name, _write in WRITES.items():
    add(_name, each(_write), weights=True)
for _root in (
    "encoder.layer.1",
    DENSE,
    NORM,
    "encoder.layer.0.attention.self.query",
    "embeddings.word_embeddings",
    "embeddings.LayerNorm",
    "classifier",
):
    add(f"data-mul-of-{_root}", each(lambda p: p.data.mul_(1.5), _root), weights=True)
add(
    "data-mul-of-pooler",
    each(lambda p: p.data.mul_(1.5), "pooler"),
    weights=True,
    task="ForSequenceClassification",
)


@change("data-mul-then-refresh", weights=True)
def _(model):
    ask(model)
    part(model, DENSE).weight.data.mul_(3)
    refresh(model)


@change("one-element-by-data-then-refresh", weights=True)
def _(model):
    """No look at a few elements finds this one; refresh promises it."""
    ask(model)
    part(model, NORM).weight.data.view(-1)[17] += 5
    refresh(model)


def refresh(model):
    """What a user calls on a swapped model; the twin needs nothing of the kind."""
    if hasattr(model, "dynplan"):
        model.dynplan.refresh()


@change("one-element-by-index", weights=True)
def _(model):
    with torch.no_grad():
        part(model, NORM).weight[17] += 5


@change("foreach-mul", weights=True)
def _(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.3)


@change("foreach-copy", weights=True)
def _(model):
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(other(model).parameters()))


@change("inference-mode-mul", weights=True)
def _(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.3)


@change("load-state-dict", weights=True)
def _(model):
    model.load_state_dict(other(model).state_dict())


@change("load-state-dict-assign", weights=True)
def _(model):
    model.load_state_dict(other(model).state_dict(), assign=True)


@change("load-state-dict-of-one-layer", weights=True)
def _(model):
    layers(model)[1].load_state_dict(layers(other(model))[1].state_dict())


@change("load-state-dict-not-strict", weights=True)
def _(model):
    state = {name: value for name, value in other(model).state_dict().items() if "layer.1" in name}
    model.load_state_dict(state, strict=False)


@change("vector-to-parameters", weights=True)
def _(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.3 * vector, model.parameters())


@change("parameters-replaced", weights=True)
def _(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.3))


@change("parameters-not-contiguous", weights=True)
def _(model):
    for layer in layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter((1.3 * module.weight.detach()).t().contiguous().t())


@change("initialised-anew", weights=True)
def _(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)


@change("share-memory-then-numpy-view", weights=True)
def _(model):
    model.share_memory()
    ask(model)
    for parameter in model.parameters():
        write_numpy(parameter)


@change("share-memory-then-another-process-writes", weights=True)
def _(model):
    model.share_memory()
    ask(model)
    child = os.fork()
    if not child:  # NumPy alone: PyTorch's threads do not live in a fork
        try:
            for parameter in model.parameters():
                write_numpy(parameter)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@change("weights-averaged-in-and-out", visible=False, weights=True)
def _(model):
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    each(lambda p: p.data.mul_(1.3))(model)
    ask(model)
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)


@change("weights-averaged-in", weights=True)
def _(model):
    for parameter, average in zip(model.parameters(), other(model).parameters(), strict=True):
        parameter.data, average.data = average.data, parameter.data


@change("averaged-model", weights=True)
def _(model):
    averaged = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    ask(model)
    averaged.update_parameters(other(model))
    averaged.update_parameters(other(model))
    averaged.update_parameters(small(seed=2))
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), averaged.module.parameters(), strict=True):
            parameter.data.copy_(average)


@change("half-and-back", weights=True)
def _(model):
    """The type is the same again, the numbers are not quite."""
    each(lambda p: p.data.mul_(1.3))(model)
    ask(model)
    model.half().float()


@change("bfloat16-and-back", weights=True)
def _(model):
    model.bfloat16().float()


@change("double-and-back", weights=True, visible=False)
def _(model):
    ask(model.double())
    model.float()


@change("layers-share-a-linear", weights=True)
def _(model):
    layers(model)[1].output.dense = layers(model)[0].output.dense


@change("layers-share-a-parameter-written-later", weights=True)
def _(model):
    layers(model)[1].output.dense.weight = layers(model)[0].output.dense.weight
    ask(model)
    layers(model)[0].output.dense.weight.data.mul_(1.5)


@change("word-embeddings-resized", weights=True)
def _(model):
    model.resize_token_embeddings(120, mean_resizing=False)
    each(lambda p: p.data.mul_(1.5), "embeddings.word_embeddings")(model)


@change("word-embeddings-cut", weights=True)
def _(model):
    """Ids of the batch stay within what is left."""
    words = part(model, "embeddings.word_embeddings")
    words.weight.data.mul_(1.5)
    model.resize_token_embeddings(97, mean_resizing=False)


@change("position-embeddings-longer", weights=True)
def _(model):
    embeddings = encoder_of(model).embeddings
    table = nn.Embedding(60, 32)
    nn.init.normal_(table.weight, std=0.3)
    embeddings.position_embeddings = table
    embeddings.position_ids = torch.arange(60).unsqueeze(0)
    embeddings.token_type_ids = torch.zeros(1, 60, dtype=torch.long)


@change("inference-model-load-state-dict", weights=True, inference=True)
def _(model):
    model.load_state_dict(other(model).state_dict())


@change("inference-model-mul", weights=True, inference=True)
def _(model):
    for parameter in model.parameters():
        parameter.mul_(1.3)


@change("inference-model-data-mul", weights=True, inference=True)
def _(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.3)


@change("inference-model-refresh", weights=True, inference=True)
def _(model):
    ask(model)
    for parameter in model.parameters():
        parameter.mul_(1.3)
    refresh(model)
