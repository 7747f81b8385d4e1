"""Steps of PyTorch's optimizers: fused ones raise no version counter."""

import torch
from integrations.change import add, ask, change, layers
from integrations.models import batch
from torch import nn

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.5)),
    "sgd-momentum": (torch.optim.SGD, dict(lr=0.5, momentum=0.9)),
    "sgd-nesterov": (torch.optim.SGD, dict(lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "adam": (torch.optim.Adam, dict(lr=0.02)),
    "adam-amsgrad": (torch.optim.Adam, dict(lr=0.02, amsgrad=True)),
    "adamw": (torch.optim.AdamW, dict(lr=0.02)),
    "adagrad": (torch.optim.Adagrad, dict(lr=0.02)),
    "nadam": (torch.optim.NAdam, dict(lr=0.02)),
    "radam": (torch.optim.RAdam, dict(lr=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.01)),
    "rprop": (torch.optim.Rprop, dict(lr=0.02)),
    "adadelta": (torch.optim.Adadelta, dict(lr=10.0)),
    "adamax": (torch.optim.Adamax, dict(lr=0.02)),
    "asgd": (torch.optim.ASGD, dict(lr=0.5)),
}
WITH_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
VARIANTS = {"plain": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}


def give_gradients(model: nn.Module) -> None:
    """The same gradients whoever computes them, so that a step depends on no rounding."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)


def step_with(make):
    def apply(model):
        optimizer = make(model)
        for _ in range(2):
            give_gradients(model)
            optimizer.step()
            optimizer.zero_grad()

    return apply


for _name, (_kind, _options) in OPTIMIZERS.items():
    for _variant, _how in VARIANTS.items():
        if _variant != "fused" or _kind in WITH_FUSED:
            add(
                f"{_name}-{_variant}",
                step_with(lambda m, k=_kind, o={**_options, **_how}: k(m.parameters(), **o)),
                weights=True,
            )
add("adafactor", step_with(lambda m: torch.optim.Adafactor(m.parameters(), lr=0.05)), weights=True)
add(
    "muon",
    step_with(lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.1)),
    weights=True,
)


@change("lbfgs", weights=True)
def _(model):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=1)

    def closure():
        give_gradients(model)
        return torch.zeros(())

    optimizer.step(closure)


@change("adamw-fused-on-the-second-layer-only", weights=True)
def _(model):
    give_gradients(model)
    torch.optim.AdamW(layers(model)[1].parameters(), lr=0.05, fused=True).step()


@change("adamw-fused-with-forwards-between", weights=True)
def _(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for _ in range(3):
        give_gradients(model)
        optimizer.step()
        ask(model)
    give_gradients(model)
    optimizer.step()


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(**batch((5, 5))).logits.square().mean().backward()
        optimizer.step()
        model.eval()
        ask(model)


for _variant, _how in VARIANTS.items():
    add(
        f"training-with-sgd-{_variant}",
        lambda m, how=_how: train(m, torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, **how)),
        trains=True,
        slack=100,
    )
    add(
        f"training-with-adamw-{_variant}",
        lambda m, how=_how: train(m, torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-3, **how)),
        trains=True,
        slack=1000,
    )
