"""Changes round the model: its configuration, its type, where it lives, and copies of it."""

import copy
import io
import pickle
import tempfile

import torch
from integrations.change import add, ask, change, encoder_of, layers, other, part
from torch import nn


def setting(name, value):
    return lambda model: setattr(model.config, name, value)


add("config-output-hidden-states", setting("output_hidden_states", True), visible=False)
add("config-no-return-dict", setting("return_dict", False), visible=False)
# Modules read these when they are made, and never again.
add("config-hidden-act", setting("hidden_act", "relu"), visible=False)
add("config-layer-norm-eps", setting("layer_norm_eps", 0.5), visible=False)
add("config-number-of-heads", setting("num_attention_heads", 2), visible=False)
add("config-number-of-layers", setting("num_hidden_layers", 1), visible=False)
add("config-dropout", setting("hidden_dropout_prob", 0.5), visible=False)
add("config-is-decoder", setting("is_decoder", True), may_refuse=True)
add("config-is-causal", setting("is_causal", True), may_refuse=True, visible=False)


@change("config-replaced", visible=False)
def _(model):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)


@change("config-replaced-by-one-that-asks-for-hidden-states", visible=False)
def _(model):
    encoder_of(model).config = copy.deepcopy(model.config)
    encoder_of(model).config.output_hidden_states = True


@change("attention-eager", visible=False)
def _(model):
    model.set_attn_implementation("eager")


@change("attention-eager-by-config", visible=False)
def _(model):
    model.config._attn_implementation = "eager"


def flat_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """An attention half as sharp."""
    scores = query @ key.transpose(2, 3) * (0.5 * query.shape[-1] ** -0.5)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@change("attention-of-ones-own", may_refuse=True)
def _(model):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("flat", flat_attention)
    AttentionMaskInterface.register("flat", sdpa_mask)
    model.set_attn_implementation("flat")


@change("attention-registered-in-place-of-sdpa", may_refuse=True)
def _(model):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["sdpa"] = flat_attention  # of this object alone, before the global ones
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


add("half", lambda m: m.half() and None, reduced=True)
add("bfloat16", lambda m: m.bfloat16() and None, reduced=True)
add("double", lambda m: m.double() and None, visible=False)
add("float", lambda m: m.float() and None, visible=False)
add("half-with-a-write", lambda m: louder_layer(m.half()) and None, reduced=True)


@change("autocast", reduced=True)
def _(model):
    with torch.autocast("cpu", torch.bfloat16):
        yield


add("no-gradients-wanted", lambda m: m.requires_grad_(False) and None, visible=False)
add("gradient-checkpointing", lambda m: m.gradient_checkpointing_enable(), visible=False)


@change("gradients-on")
def _(model):
    part(model, "encoder.layer.1.output.dense").weight.data.mul_(1.5)

    def with_gradients(**inputs):
        with torch.enable_grad():
            return model(**inputs)

    return with_gradients


@change("functional-call")
def _(model):
    state = other(model).state_dict()
    return lambda **inputs: torch.func.functional_call(model, state, kwargs=inputs)


@change("functional-call-and-back", visible=False, weights=True)
def _(model):
    from integrations.models import batch

    with torch.no_grad():
        torch.func.functional_call(model, other(model).state_dict(), kwargs=batch((3, 2)))


add("data-parallel", lambda m: nn.DataParallel(m), visible=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_pretrained(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def louder_layer(model):
    layers(model)[1].output.dense.weight.data.mul_(1.5)
    return model


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch-save": saved}
for _name, _copy in COPIES.items():
    add(_name, _copy, visible=False, copies=True, weights=True)
    add(f"{_name}-then-written", lambda m, c=_copy: louder_layer(c(m)), copies=True, weights=True)
    add(f"written-then-{_name}", lambda m, c=_copy: c(louder_layer(m)), copies=True, weights=True)
    add(
        f"{_name}-then-the-first-is-written",
        lambda m, c=_copy: (c(m), louder_layer(m))[0],
        copies=True,
        weights=True,
        visible=False,
    )
    add(
        f"{_name}-which-is-written",
        lambda m, c=_copy: louder_layer(c(m)) and None,
        weights=True,
        visible=False,
    )
add("save-pretrained", saved_pretrained, visible=False, copies=True)
add("save-pretrained-after-a-write", lambda m: saved_pretrained(louder_layer(m)), copies=True)


@change("load-what-was-saved", weights=True)
def _(model):
    file = io.BytesIO()
    torch.save(other(model).state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, mmap=False))


@change("cpu-offload", visible=False)
def _(model):
    import accelerate

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@change("disk-offload", visible=False)
def _(model):
    import accelerate

    with tempfile.TemporaryDirectory() as folder:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
        yield


@change("disk-offload-and-back", visible=False)
def _(model):
    import accelerate
    from accelerate.hooks import remove_hook_from_submodules

    with tempfile.TemporaryDirectory() as folder:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
        ask(model)
        weights = dict(torch.load(io.BytesIO(_bytes(other(model)))))
        remove_hook_from_submodules(model)
        model.load_state_dict(weights, assign=True)
        yield


def _bytes(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


@change("accelerate-prepares-the-model", visible=False)
def _(model):
    import accelerate

    return accelerate.Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
