"""Operations of the long proof on modules: hooks, settings, classes, parametrizations."""

import torch
from integrations.changed_classes import altered, blurred
from integrations.proof_operations import operation
from integrations.proof_pair import Ended, Pair, Side
from torch import nn
from torch.nn.utils import parametrizations, prune

# ---- hooks. Objects rather than closures, so that models with them can be pickled.


class AlterOutput:
    def __call__(self, module, args, output):
        return altered(output)


class AlterInput:
    def __call__(self, module, args):
        if args and args[0].is_floating_point():
            return (blurred(args[0]), *args[1:])


class Look:
    def __call__(self, module, args, output=None):
        return None


class OwnForward:
    """Takes the place of one module's forward."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return altered(type(self.module).forward(self.module, *args, **kwargs))


def a_path(pair: Pair, kinds=None) -> str:
    """A submodule of the bare encoder, mostly one inside a layer."""
    named = [
        name
        for name, module in pair.twin.encoder.named_modules()
        if name and not isinstance(module, nn.ModuleList) and (kinds is None or type(module) in kinds)
    ]
    if not named:  # all of them are of other classes by now
        raise Ended
    return pair.random.choice(named)


@operation("hooks", 5)
def hook(pair: Pair) -> None:
    path, what = a_path(pair), pair.random.choice((AlterOutput(), AlterInput(), Look()))

    def action(side: Side):
        module = side.encoder.get_submodule(path)
        if isinstance(what, AlterInput):
            module.register_forward_pre_hook(what)
        else:
            module.register_forward_hook(what)

    pair.both(f"{type(what).__name__} on {path}", action)


@operation("hooks", 5)
def hooks_off(pair: Pair) -> None:
    def action(side: Side):
        for module in side.called.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, one in list(hooks.items()):
                    if isinstance(one, (AlterOutput, AlterInput, Look)):
                        del hooks[key]

    pair.both("hooks off", action)


@operation("hooks", 1)
def backward_hook(pair: Pair) -> None:
    path = a_path(pair, (nn.Linear, nn.LayerNorm))
    pair.both(
        f"backward hook on {path}",
        lambda side: side.encoder.get_submodule(path).register_full_backward_hook(Look()),
    )


@operation("hooks", 2)
def own_forward(pair: Pair) -> None:
    path = a_path(pair)

    def action(side: Side):
        module = side.encoder.get_submodule(path)
        module.forward = OwnForward(module)

    pair.both(f"own forward of {path}", action)


@operation("hooks", 3)
def own_forwards_off(pair: Pair) -> None:
    def action(side: Side):
        for module in side.called.modules():
            if isinstance(vars(module).get("forward"), OwnForward):
                del module.forward

    pair.both("own forwards off", action)


# ---- modules


class AlteredLinear(nn.Linear):
    def forward(self, x):
        return blurred(super().forward(x))


class AlteredNorm(nn.LayerNorm):
    def forward(self, x):
        return blurred(super().forward(x))


def a_layer(pair: Pair) -> int | None:
    depth = len(pair.twin.layers)
    return pair.random.randrange(depth) if depth else None


ACTIVATIONS = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "GELU": nn.GELU, "SiLU": nn.SiLU}


@operation("modules", 2)
def activation(pair: Pair) -> None:
    number, name = a_layer(pair), pair.random.choice(list(ACTIVATIONS))
    if number is not None:
        pair.both(
            f"activation of layer {number} {name}",
            lambda side: setattr(
                side.layers[number].intermediate, "intermediate_act_fn", ACTIVATIONS[name]()
            ),
        )


@operation("modules", 2)
def eps(pair: Pair) -> None:
    path, value = a_path(pair, (nn.LayerNorm,)), pair.random.choice((1e-12, 1e-5, 0.1))
    pair.both(f"eps of {path} {value}", lambda side: setattr(side.encoder.get_submodule(path), "eps", value))


@operation("modules", 2)
def scaling(pair: Pair) -> None:
    number, value = a_layer(pair), pair.random.choice((0.2, 8**-0.5, 0.5))
    if number is not None:
        pair.both(
            f"scaling of layer {number} {value}",
            lambda side: setattr(side.layers[number].attention.self, "scaling", value),
        )


@operation("modules", 2)
def dropouts_all_or_nothing(pair: Pair) -> None:
    """Dropouts of probability one in training mode: Monte Carlo dropout without the chance."""
    number = a_layer(pair)
    if number is None:
        return
    on = pair.random.random() < 0.6

    def action(side: Side):
        for dropout in (side.layers[number].output.dropout, side.layers[number].attention.output.dropout):
            dropout.p = float(on)
            dropout.train(on)

    pair.both(f"dropouts of layer {number} {'in training mode' if on else 'off'}", action)


@operation("modules", 2)
def replace_module(pair: Pair) -> None:
    path = a_path(pair, (nn.Linear, nn.LayerNorm))

    def action(side: Side):
        parent, _, name = path.rpartition(".")
        old = side.encoder.get_submodule(path)
        if isinstance(old, nn.Linear):
            new = AlteredLinear(old.in_features, old.out_features)
        else:
            new = AlteredNorm(old.normalized_shape, eps=old.eps)
        new.load_state_dict(old.state_dict())
        setattr(side.encoder.get_submodule(parent), name, new.to(old.weight.dtype).eval())

    pair.both(f"replace {path}", action)


@operation("modules", 2)
def change_class(pair: Pair) -> None:
    path, plain = (
        a_path(pair, (nn.Linear, nn.LayerNorm)),
        {nn.Linear: AlteredLinear, nn.LayerNorm: AlteredNorm},
    )

    def action(side: Side):
        module = side.encoder.get_submodule(path)
        module.__class__ = plain[type(module)]

    pair.both(f"class of {path}", action)


@operation("modules", 2)
def plain_classes_again(pair: Pair) -> None:
    def action(side: Side):
        for module in side.called.modules():
            if type(module) in (AlteredLinear, AlteredNorm):
                module.__class__ = type(module).__base__

    pair.both("plain classes again", action)


@operation("modules", 1.5)
def prune_linear(pair: Pair) -> None:
    path, amount = a_path(pair, (nn.Linear,)), pair.random.choice((0.2, 0.5))
    for_good = pair.random.random() < 0.5

    def action(side: Side):
        module = side.encoder.get_submodule(path)
        with torch.no_grad():
            prune.l1_unstructured(module, "weight", amount)
            if for_good:
                prune.remove(module, "weight")

    pair.both(f"prune {path} by {amount}{' for good' if for_good else ''}", action)


@operation("modules", 0.7)
def parametrize_linear(pair: Pair) -> None:
    """Not by spectral_norm, whose weight depends on how many forwards there were in training mode."""
    path = a_path(pair, (nn.Linear,))
    how = pair.random.choice((parametrizations.weight_norm, parametrizations.orthogonal))
    pair.both(f"{how.__name__} of {path}", lambda side: how(side.encoder.get_submodule(path)) and None)


@operation("modules", 1)
def share_linear(pair: Pair) -> None:
    number = a_layer(pair)

    def action(side: Side):
        side.layers[number].output.dense = side.layers[0].output.dense

    if number:
        pair.both(f"layer {number} shares a linear of layer 0", action)
