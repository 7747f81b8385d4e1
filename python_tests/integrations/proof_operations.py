"""What the long proof draws from: operations on a pair of models, by theme."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from integrations.proof_pair import Mismatch, Pair, Side, attempt, token_mask
from torch import nn

from dynplan.policies import FixedPath, HashPath, KeepAll, Policy, RandomPath, StaticPath


@dataclass(frozen=True)
class Operation:
    """One kind of operation.

    Attributes:
        name: for the counts.
        theme: a sequence draws from some themes only, so that many stay on the fast way.
        weight: how often it is drawn.
        run: does it.
    """

    name: str
    theme: str
    weight: float
    run: Callable[[Pair], None]


OPERATIONS: list[Operation] = []
ALWAYS = ("inference", "policy", "writes")
SOMETIMES = (
    "training",
    "adapters",
    "hooks",
    "modules",
    "structure",
    "types",
    "copies",
    "swapping",
    "settings",
)


def operation(theme: str, weight: float = 1.0) -> Callable:
    def register(run: Callable) -> Callable:
        OPERATIONS.append(Operation(run.__name__.strip("_"), theme, weight, run))
        return run

    return register


# ---- inference


def inputs_of(pair: Pair) -> tuple[str, dict]:
    """A random batch in one of the forms that Hugging Face accepts."""
    draw = pair.random
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    batch_size, length = draw.choice((1, 1, 1, 2, 2, 3)), draw.choice((1, 2, 3, 5, 5, 8, 8, 13))
    side = draw.choices(("right", "left", "holes", "none"), (6, 1, 1, 2))[0]
    lowest = 0 if draw.random() < 0.04 else 1
    lengths = torch.tensor([draw.randint(lowest, length) for _ in range(batch_size)]).unsqueeze(1)
    place = torch.arange(length)
    if side == "right":
        mask = place < lengths
    elif side == "left":
        mask = place.flip(0) < lengths
    elif side == "holes":
        mask = torch.rand(batch_size, length, generator=generator) < 0.7
        mask[:, 0] = True
    else:
        mask = torch.ones(batch_size, length, dtype=torch.bool)
    ids = torch.randint(2, 97, (batch_size, length), generator=generator)
    if draw.random() < 0.8:
        ids = ids.where(mask, 1)
    inputs = {"input_ids": ids.int() if draw.random() < 0.05 else ids}
    words = [f"{batch_size}x{length} {side}"]
    if side != "none" or draw.random() < 0.3:
        kind = draw.choice(("int64", "int64", "int64", "int32", "bool", "float32"))
        inputs["attention_mask"] = mask.to(getattr(torch, kind))
        words.append(f"mask {kind}")
    if draw.random() < 0.3:
        rows = draw.choice((batch_size, batch_size, 1))
        inputs["token_type_ids"] = torch.randint(0, 2, (rows, length), generator=generator)
        words.append(f"types ({rows}, {length})")
    if draw.random() < 0.15:
        rows = draw.choice((batch_size, batch_size, 1))
        inputs["position_ids"] = torch.randint(0, 38, (rows, length), generator=generator)
        words.append(f"positions ({rows}, {length})")
    if draw.random() < 0.08:
        table = pair.twin.encoder.embeddings.word_embeddings
        width = getattr(table, "embedding_dim", 32)
        dtype = next(pair.twin.model.parameters()).dtype
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(batch_size, length, width, generator=generator).to(dtype)
        words.append("embeddings given")
    # Hugging Face's own hooks record a layer's states before or after another hook alters them, as the two
    # came to hang there; a swapped model's are those after it.
    around = (pair.ours.encoder.encoder, *pair.ours.layers)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in around)
    if hooked and pair.twin.model.config.output_hidden_states:
        inputs["output_hidden_states"] = False
    elif pair.states and draw.random() < 0.2 and not hooked:
        inputs["output_hidden_states"] = True
        words.append("hidden states")
    if draw.random() < 0.1:
        inputs["return_dict"] = False
        words.append("a tuple")
    return ", ".join(words), inputs


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
}


@operation("inference", 40)
def forward(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    mode = pair.random.choices(list(MODES), (7, 2, 1))[0]
    with MODES[mode]():
        pair.compare(f"forward {text}, {mode}", inputs)


@operation("inference", 3)
@torch.no_grad()
def forwards_of_one_batch(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    for _ in range(2):
        pair.compare(f"forward {text}", inputs)


@operation("inference", 0.7)
@torch.no_grad()
def wrong_inputs(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    if "input_ids" not in inputs:
        return
    which = pair.random.choice(("id too large", "id below zero", "too long", "types too large", "no inputs"))
    ids = inputs["input_ids"]
    if which == "id too large":
        ids[0, 0] = 500
    elif which == "id below zero":
        ids[0, 0] = -500
    elif which == "too long":
        inputs = {"input_ids": torch.full((1, 70), 5)}
    elif which == "types too large":
        inputs["token_type_ids"] = torch.full_like(ids, 2)
    else:
        inputs = {}
        pair.log.append("forward without inputs")
        results = [attempt(lambda side: side.called(), side, 0) for side in (pair.twin, pair.ours)]
        if not all(isinstance(result, Exception) for result in results):
            raise Mismatch(f"forward without inputs: {results}")
        return
    if token_mask(inputs)[0, 0]:  # what stands at padding is nobody's business
        pair.compare(f"forward with {which}: {text}", inputs)


class Scaled(nn.Module):
    """A model called with its weights times a factor."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, **inputs):
        state = {name: self.factor * value for name, value in self.model.named_parameters()}
        return torch.func.functional_call(self.model, state, kwargs=inputs)


@operation("inference", 1)
@torch.no_grad()
def functional_call(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    factor = pair.random.uniform(0.7, 1.3)
    if pair.weights is not None or pair.adapter:
        return
    keep_all_again(pair)  # the twin's state names all layers
    kept = pair.twin.called, pair.ours.called
    try:
        for side in (pair.twin, pair.ours):
            side.called = Scaled(side.called, factor).eval()
        pair.compare(f"functional_call with weights times {factor:.2f}: {text}", inputs)
    finally:
        pair.twin.called, pair.ours.called = kept


# ---- policies


class EveryOther(Policy):
    """A user's stepwise policy: from the offsets and the decisions so far."""

    stepwise = True

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn

    def keep(self, layer, request, hidden, plan):
        lengths = request.cu_seqlens.diff()
        return (lengths + layer + self.turn + plan.sum(1)) % 3 != 0

    def options(self):
        return {"turn": self.turn}


class LongTakeAll(Policy):
    """A user's upfront policy that looks at the states."""

    def plan(self, request):
        keep = torch.ones(request.batch_size, request.num_layers, dtype=torch.bool, device=request.device)
        keep[:, ::2] &= request.cu_seqlens.diff().unsqueeze(1) >= 4
        assert request.hidden.shape[0] >= int(request.cu_seqlens[-1])
        return keep


def a_policy(pair: Pair) -> Policy:
    draw, depth = pair.random, len(pair.twin.layers)
    budget, seed = draw.choice((0.0, 0.25, 0.5, 0.5, 0.75, 1.0)), draw.randrange(9)
    layers = list(range(depth))
    return draw.choice(
        (
            lambda: KeepAll(),
            lambda: FixedPath(torch.tensor([draw.random() < 0.6 for _ in layers], dtype=torch.bool)),
            lambda: RandomPath(budget, seed),
            lambda: RandomPath(budget, seed),
            lambda: StaticPath({size: draw.sample(layers, size) for size in range(depth + 1)}, budget),
            lambda: HashPath(budget, seed),
            lambda: EveryOther(seed),
            lambda: LongTakeAll(),
        )
    )()


@operation("policy", 8)
def set_policy(pair: Pair) -> None:
    if pair.swapped:
        controller = pair.ours.controller
        controller.policy = a_policy(pair)
        if not controller.policy.takes_budget:
            controller.budget = None
        pair.log.append(f"policy {controller.policy}")


@operation("policy", 4)
@torch.no_grad()
def forward_on_a_plan_per_sample(pair: Pair) -> None:
    if pair.swapped:
        text, inputs = inputs_of(pair)
        shape = len(token_mask(inputs)), len(pair.twin.layers)
        keep = torch.tensor([[pair.random.random() < 0.6 for _ in range(shape[1])] for _ in range(shape[0])])
        controller = pair.ours.controller
        kept = controller.policy, controller.budget
        controller.policy, controller.budget = FixedPath(keep.bool().reshape(shape)), None
        try:
            pair.compare(f"forward on {keep.tolist()}: {text}", inputs)
        finally:
            pair.ours.controller.policy, pair.ours.controller.budget = kept


@operation("policy", 3)
def set_budget(pair: Pair) -> None:
    if pair.swapped:
        controller = pair.ours.controller
        taken = controller.policy.takes_budget or pair.random.random() < 0.1
        controller.budget = pair.random.choice((None, 0.0, 0.3, 0.5, 0.8, 1.0)) if taken else None
        pair.log.append(f"budget {controller.budget}")


@operation("policy", 2)
def keep_all_again(pair: Pair) -> None:
    if pair.swapped:
        pair.ours.controller.policy, pair.ours.controller.budget = KeepAll(), None
        pair.log.append("policy KeepAll()")


# ---- writes


def a_name(pair: Pair) -> str:
    names = [name for name, p in pair.twin.model.named_parameters() if p.numel() > 1]
    return pair.random.choice(names)


def named(side: Side, name: str) -> nn.Parameter:
    return dict(side.model.named_parameters())[name]


def write_data(p, f):
    p.data.mul_(f)


def write_copy(p, f):
    p.data.copy_(f * p.data)


def write_assigned(p, f):
    p.data = f * p.data


def write_numpy(p, f):
    p.detach().numpy()[...] *= f


def write_set(p, f):
    with torch.no_grad():
        p.set_(f * p.detach())


def write_in_place(p, f):
    with torch.no_grad():
        p.mul_(f)


def write_row(p, f):
    with torch.no_grad():
        p[0] *= 2 * f


WRITES = (write_data, write_copy, write_assigned, write_numpy, write_set, write_in_place, write_row)


@operation("writes", 8)
def write(pair: Pair) -> None:
    name, how = a_name(pair), pair.random.choice(WRITES)
    factor = pair.random.choice((0.8, 0.9, 1.1, 1.25))
    dtype = named(pair.twin, name).dtype
    if dtype == torch.bfloat16:  # NumPy has no such type
        how = write_data
    pair.both(f"{how.__name__} {name} by {factor}", lambda side: how(named(side, name), factor))


@operation("writes", 2)
def write_everywhere(pair: Pair) -> None:
    how, factor = pair.random.choice((write_data, write_in_place, write_set)), pair.random.choice((0.9, 1.1))

    def action(side: Side):
        for parameter in side.model.parameters():
            how(parameter, factor)

    pair.both(f"{how.__name__} all by {factor}", action)


@operation("writes", 2)
def one_element_then_refresh(pair: Pair) -> None:
    name = a_name(pair)

    def action(side: Side):
        named(side, name).data.view(-1)[0] += 0.5
        if side.controller is not None:
            side.controller.refresh()

    pair.both(f"one element of {name} through .data, then refresh()", action)


@operation("writes", 1)
def refresh(pair: Pair) -> None:
    if pair.swapped:
        pair.log.append("refresh()")
        pair.ours.controller.refresh()


@operation("writes", 2)
def load_state_dict(pair: Pair) -> None:
    assign = pair.random.random() < 0.4

    def action(side: Side):
        state = {
            name: (0.9 * value + 0.05 * torch.randn_like(value))
            if value.is_floating_point()
            else value.clone()
            for name, value in side.model.state_dict().items()
        }
        side.model.load_state_dict(state, assign=assign)

    pair.both(f"load_state_dict(assign={assign})", action)


@operation("writes", 1)
def averaged_in_and_out(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    kept = []

    def write_average(side: Side):
        kept.append([p.detach().clone() for p in side.model.parameters()])
        for parameter in side.model.parameters():
            parameter.data.mul_(1.1)

    def write_back(side: Side):
        for parameter, value in zip(side.model.parameters(), kept.pop(0), strict=True):
            parameter.data.copy_(value)

    pair.both("averaged weights in", write_average)
    with torch.no_grad():
        pair.compare(f"forward {text}", inputs)
    pair.both("averaged weights out", write_back)
