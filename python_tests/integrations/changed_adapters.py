"""PEFT's adapters: put on, disabled, merged, taken off."""

import torch
from integrations.change import add, ask, change
from torch import nn

TARGETS = dict(target_modules=["query", "value", "output.dense"])


def config(kind="lora", **options):
    import peft

    makers = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **{**TARGETS, **options}),
        "dora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **TARGETS),
        "ia3": lambda: peft.IA3Config(
            target_modules=["key", "value", "intermediate.dense"],
            feedforward_modules=["intermediate.dense"],
            init_ia3_weights=False,
        ),
        "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, **TARGETS),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, init_weights=False, **TARGETS),
    }
    return makers[kind]()


def adapted(model, kind="lora", **options):
    """The model under an adapter whose weights are random, so that it changes the answer."""
    import peft

    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config(kind, **options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "ia3" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return wrapped


def active(kind):
    return lambda model: adapted(model, kind)


def disabled(kind):
    def apply(model):
        wrapped = adapted(model, kind)
        ask(wrapped)
        with wrapped.disable_adapter():
            yield wrapped

    return apply


def merged(kind):
    def apply(model):
        wrapped = adapted(model, kind)
        ask(wrapped)
        wrapped.merge_adapter()
        return wrapped

    return apply


def merged_and_back(kind):
    def apply(model):
        wrapped = adapted(model, kind)
        wrapped.merge_adapter()
        ask(wrapped)
        wrapped.unmerge_adapter()
        return wrapped

    return apply


def merged_for_good(kind):
    """The plain modules come back, with other numbers in them."""
    return lambda model: adapted(model, kind).merge_and_unload() and None


for _kind in ("lora", "dora", "ia3"):
    add(f"{_kind}-active", active(_kind))
    add(f"{_kind}-disabled", disabled(_kind), visible=False)
    add(f"{_kind}-merged", merged(_kind))
    add(f"{_kind}-merged-and-back", merged_and_back(_kind), slack=10)
    add(f"{_kind}-merged-for-good", merged_for_good(_kind), weights=True)
for _kind in ("loha", "oft"):
    add(f"{_kind}-active", active(_kind))
    add(f"{_kind}-merged-for-good", merged_for_good(_kind), weights=True)


@change("lora-unloaded", visible=False, weights=True)
def _(model):
    wrapped = adapted(model)
    ask(wrapped)
    wrapped.unload()


@change("lora-merged-for-good-after-forwards", weights=True)
def _(model):
    wrapped = adapted(model)
    ask(wrapped)
    wrapped.merge_and_unload()


@change("lora-on-every-linear")
def _(model):
    return adapted(model, target_modules="all-linear")


@change("lora-on-word-embeddings")
def _(model):
    return adapted(model, target_modules=["word_embeddings"])


@change("lora-with-a-head-of-its-own")
def _(model):
    wrapped = adapted(model, modules_to_save=["classifier"])
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(2)
    return wrapped


@change("lora-two-adapters-the-second-set")
def _(model):
    wrapped = adapted(model)
    wrapped.add_adapter("second", config())
    ask(wrapped)
    wrapped.set_adapter("second")
    return wrapped


@change("lora-scaled-down")
def _(model):
    wrapped = adapted(model)
    ask(wrapped)
    for module in wrapped.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 0.5
    return wrapped


@change("lora-weights-written")
def _(model):
    wrapped = adapted(model)
    ask(wrapped)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.5)
    return wrapped


@change("lora-injected")
def _(model):
    import peft

    peft.inject_adapter_in_model(config(), model)


@change("prompt-tuning", may_refuse=True)
def _(model):
    import peft

    options = dict(
        task_type="TOKEN_CLS", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4
    )
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(**options)).eval()
    return lambda **inputs: _drop_prompt(wrapped(**inputs))


def _drop_prompt(output):
    output.logits = output.logits[:, 2:]
    return output


@change("lora-trained-with-adamw-fused", trains=True, slack=1000)
def _(model):
    from integrations.models import batch

    wrapped = adapted(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, eps=1e-3, fused=True)
    for _ in range(2):
        wrapped.train()
        wrapped(**batch((5, 5))).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        ask(wrapped)
    return wrapped
