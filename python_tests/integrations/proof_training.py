"""Operations of the long proof that learn: optimizer steps, training mode, adapters."""

import copy

import torch
from integrations.proof_operations import inputs_of, operation
from integrations.proof_pair import Mismatch, Pair, Side, answer, attempt, planned_answer, token_mask

# ---- training

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, dict(lr=0.02), True),
    "SGD with momentum": (torch.optim.SGD, dict(lr=0.02, momentum=0.9), True),
    "Adam": (torch.optim.Adam, dict(lr=0.005), True),
    "AdamW": (torch.optim.AdamW, dict(lr=0.005), True),
    "Adagrad": (torch.optim.Adagrad, dict(lr=0.005), True),
    "NAdam": (torch.optim.NAdam, dict(lr=0.005), False),
    "RAdam": (torch.optim.RAdam, dict(lr=0.005), False),
    "RMSprop": (torch.optim.RMSprop, dict(lr=0.002), False),
    "Rprop": (torch.optim.Rprop, dict(lr=0.005), False),
    "Adadelta": (torch.optim.Adadelta, dict(lr=1.0), False),
    "Adamax": (torch.optim.Adamax, dict(lr=0.005), False),
    "ASGD": (torch.optim.ASGD, dict(lr=0.02), False),
}


@operation("training", 10)
def train_step(pair: Pair) -> None:
    parameter = next(pair.twin.model.parameters())
    if parameter.dtype != torch.float32 or (pair.weights is not None and pair.swapped):
        return
    text, inputs = inputs_of(pair)
    inputs.pop("inputs_embeds", None)
    inputs.pop("return_dict", None)
    if "input_ids" not in inputs or not token_mask(inputs).any():
        return
    draw = pair.random
    name = draw.choice(list(OPTIMIZERS))
    kind, options, fuses = OPTIMIZERS[name]
    how = draw.choice(("fused", "foreach", "plain") if fuses else ("foreach", "plain"))
    options = {**options, **({how: True} if how != "plain" else dict(foreach=False))}
    pair.log.append(f"{name} {how} step on {text}")
    train, optimizers, plan = draw.random() < 0.8, {}, None
    mine, theirs = pair.ours, pair.twin

    def learn(side: Side):
        nonlocal plan
        side.called.train(train)
        trained = [p for p in side.called.parameters() if p.requires_grad]
        optimizers[side] = kind(trained, **options)
        output = answer(side.called, inputs) if side is mine else planned_answer(side, inputs, plan)
        if side is mine and side.controller is not None:
            plan = side.controller.last_plan
        # Hidden states at padding and of empty samples are left out already.
        loss = sum(value.square().mean() for value in output)
        loss.backward()

    did, twin_did = attempt(learn, mine, 1), attempt(learn, theirs, 1)
    try:
        if isinstance(did, Exception) or isinstance(twin_did, Exception):
            pair.judge(twin_did, did)
            return
        compare_gradients(pair)
        for optimizer in optimizers.values():
            optimizer.step()
        # Rounding is not to add up over a sequence. The twin packs nothing, so nothing hides by this.
        theirs.called.load_state_dict(mine.called.state_dict())
        pair.changed()
    finally:
        for side in (mine, theirs):
            side.called.zero_grad(set_to_none=True)
            side.called.eval()


def compare_gradients(pair: Pair) -> None:
    gradients = []
    for side in (pair.ours, pair.twin):
        found = {name: p.grad for name, p in side.called.named_parameters() if p.grad is not None}
        gradients.append(found)
    mine, theirs = gradients
    largest = max((g.abs().max().item() for g in theirs.values()), default=0.0)
    for name in sorted(mine.keys() | theirs.keys()):
        one, two = mine.get(name), theirs.get(name)
        one = torch.zeros_like(two) if one is None else one
        two = torch.zeros_like(one) if two is None else two
        error = (one - two).abs().max().item()
        if error > 1e-3 * max(largest, 1e-6):
            raise Mismatch(f"gradient of {name} {error:.2e} off, at a largest gradient of {largest:.2e}")
    pair.counts.comparisons += 1


@operation("training", 2)
def training_mode(pair: Pair) -> None:
    text, inputs = inputs_of(pair)
    pair.both("train()", lambda side: side.called.train())
    with torch.no_grad():
        pair.compare(f"forward in training mode {text}", inputs)
    pair.both("eval()", lambda side: side.called.eval())


@operation("training", 0.5)
def gradients_wanted(pair: Pair) -> None:
    wanted = pair.random.random() < 0.7
    pair.both(f"requires_grad_({wanted})", lambda side: side.model.requires_grad_(wanted))


# ---- adapters


@operation("adapters", 4)
def adapter_on(pair: Pair) -> None:
    import peft

    dtype = next(pair.twin.model.parameters()).dtype
    if pair.adapter or dtype != torch.float32:
        return
    draw = pair.random
    targets = draw.choice((["query", "value"], ["key", "output.dense"], ["intermediate.dense"], "all-linear"))
    kind = draw.choice(("LoRA", "LoRA", "DoRA", "IA3"))
    if kind == "IA3":
        chosen = dict(target_modules=["key", "value"], feedforward_modules=[], init_ia3_weights=False)
        config = peft.IA3Config(**chosen)
    else:
        config = peft.LoraConfig(
            r=2, target_modules=targets, init_lora_weights=False, use_dora=kind == "DoRA"
        )

    def action(side: Side):
        side.called = peft.get_peft_model(side.model, copy.deepcopy(config)).eval()

    pair.adapter = pair.both(f"{kind} on {targets}", action)
    if not pair.adapter:
        pair.twin.called, pair.ours.called = pair.twin.model, pair.ours.model


@operation("adapters", 6)
def adapter_used(pair: Pair) -> None:
    if not pair.adapter:
        return
    name = pair.random.choice(("merge_adapter", "unmerge_adapter", "disable", "enable"))
    actions = {
        "disable": lambda side: side.called.base_model.disable_adapter_layers(),
        "enable": lambda side: side.called.base_model.enable_adapter_layers(),
    }
    pair.both(name, actions.get(name, lambda side: getattr(side.called, name)()))


@operation("adapters", 3)
def adapter_off(pair: Pair) -> None:
    if not pair.adapter:
        return
    name = pair.random.choice(("unload", "merge_and_unload", "merge_and_unload"))

    def action(side: Side):
        model = getattr(side.called, name)()
        assert model is side.model
        side.called = model
        side.model.requires_grad_(True)

    if pair.both(name, action):
        pair.adapter = False
