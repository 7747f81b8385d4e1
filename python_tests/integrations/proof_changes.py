"""Operations of the long proof on the whole: structure, types, copies, swapping, settings."""

import copy
import io
import pickle

import torch
from integrations.proof_modules import a_layer
from integrations.proof_operations import a_policy, inputs_of, operation
from integrations.proof_pair import Pair, Side
from torch import nn

import dynplan

# ---- structure


def set_layers(side: Side, chosen) -> None:
    side.encoder.encoder.layer = nn.ModuleList(chosen)


@operation("structure", 2)
def cut(pair: Pair) -> None:
    depth = len(pair.twin.layers)
    left = pair.random.randint(1, depth) if depth else 0
    pair.both(f"cut to {left} layers", lambda side: set_layers(side, list(side.layers)[:left]))


@operation("structure", 1)
def reverse(pair: Pair) -> None:
    pair.both("layers reversed", lambda side: set_layers(side, list(side.layers)[::-1]))


@operation("structure", 1)
def repeat(pair: Pair) -> None:
    number = a_layer(pair)
    if number is not None and len(pair.twin.layers) < 5:
        pair.both(
            f"layer {number} once more", lambda side: set_layers(side, [*side.layers, side.layers[number]])
        )


@operation("structure", 2)
def extend(pair: Pair) -> None:
    """By a copy, which brings Hugging Face's hooks for hidden states along."""
    number = a_layer(pair)
    if number is not None and len(pair.twin.layers) < 5:

        def action(side: Side):
            side.layers.append(copy.deepcopy(side.layers[number]))
            side.layers[-1].output.dense.weight.data.mul_(1.2)

        pair.both(f"append a copy of layer {number}", action)


@operation("structure", 2)
def replace_layer(pair: Pair) -> None:
    number = a_layer(pair)
    if number is None:
        return

    def action(side: Side):
        layer = copy.deepcopy(side.layers[number])
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(0.9)
        side.layers[number] = layer

    pair.both(f"layer {number} replaced by a copy with other weights", action)


@operation("structure", 1)
def delete_layer(pair: Pair) -> None:
    number = a_layer(pair)
    if number is not None and len(pair.twin.layers) > 1:
        pair.both(f"delete layer {number}", lambda side: side.layers.__delitem__(number))


@operation("structure", 1)
def resize_embeddings(pair: Pair) -> None:
    size = pair.random.choice((97, 100, 128))
    pair.both(
        f"resize_token_embeddings({size})",
        lambda side: side.model.resize_token_embeddings(size, mean_resizing=False) and None,
    )


@operation("structure", 1)
def buffers(pair: Pair) -> None:
    name, value = pair.random.choice(
        (("token_type_ids", torch.ones), ("token_type_ids", torch.zeros), ("position_ids", torch.zeros))
    )
    pair.both(
        f"embeddings.{name} are {value.__name__}",
        lambda side: setattr(side.encoder.embeddings, name, value(1, 40, dtype=torch.long)),
    )


@operation("structure", 1)
def head_replaced(pair: Pair) -> None:
    if pair.task == "ForTokenClassification":

        def action(side: Side):
            like = next(side.model.classifier.parameters())
            side.model.classifier = nn.Linear(32, 3).to(like.dtype)

        pair.both("head replaced", action)


# ---- types


@operation("types", 2)
def to_type(pair: Pair) -> None:
    dtype = pair.random.choice((torch.bfloat16, torch.float16, torch.float64, torch.float64))
    pair.both(f"to({dtype})", lambda side: side.called.to(dtype) and None)


@operation("types", 8)
def to_float(pair: Pair) -> None:
    pair.both("float()", lambda side: side.called.float() and None)


# ---- copies


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@operation("copies", 1.5)
def go_on_with_a_copy(pair: Pair) -> None:
    how = copy.deepcopy if pair.states else pair.random.choice((copy.deepcopy, unpickled, saved))
    pair.both(f"go on with {how.__name__}", lambda side: side.replace(how))


@operation("copies", 0.7)
def write_to_a_copy(pair: Pair) -> None:
    """The copy's weights are its own."""

    def action(side: Side):
        other = copy.deepcopy(side.called)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()

    pair.both("zero a deep copy", action)


# ---- swapping


@operation("swapping", 3)
def swap_or_unswap(pair: Pair) -> None:
    if pair.swapped:
        pair.log.append("unswap")
        dynplan.unswap(pair.ours.model)
        pair.weights = None
        with torch.no_grad():
            text, inputs = inputs_of(pair)
            pair.compare(f"forward unswapped {text}", inputs)
    else:
        swap(pair)


def swap(pair: Pair) -> None:
    """Swap our side; the twin is left alone."""
    weights = pair.random.choices((None, "bfloat16", "int8"), (10, 1, 1))[0]
    policy = a_policy(pair)
    pair.log.append(f"swap with {policy}, weights={weights}")
    try:
        dynplan.swap(pair.ours.model, policy, weights=weights)
        pair.weights = weights
    except Exception as error:
        pair.judge(None, error)


# ---- settings


@operation("settings", 2)
def configuration(pair: Pair) -> None:
    name, value = pair.random.choice(
        (
            ("output_hidden_states", True),
            ("output_hidden_states", False),
            ("return_dict", False),
            ("return_dict", True),
            ("hidden_act", "relu"),
            ("layer_norm_eps", 0.3),
            ("_attn_implementation", "eager"),
            ("_attn_implementation", "sdpa"),
        )
    )
    if name == "output_hidden_states" and not pair.states:
        return
    pair.both(f"config.{name} = {value}", lambda side: setattr(side.model.config, name, value))


@operation("settings", 1)
def chunks(pair: Pair) -> None:
    size = pair.random.choice((0, 1))

    def action(side: Side):
        for layer in side.layers:
            layer.chunk_size_feed_forward = size

    pair.both(f"feed-forward in chunks of {size}", action)
