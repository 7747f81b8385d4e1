"""Changes to what a model is made of: modules, their settings, their classes and the configuration."""

import copy
import types

import torch
from integrations.change import add, ask, change, encoder_of, layers, other, part, put
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@change("activation-relu")
def _(model):
    for layer in layers(model):
        layer.intermediate.intermediate_act_fn = nn.ReLU()


@change("activation-tanh-in-one-layer")
def _(model):
    layers(model)[1].intermediate.intermediate_act_fn = nn.Tanh()


@change("activation-a-function")
def _(model):
    """As a configuration whose hidden_act is callable leaves it."""
    intermediate = layers(model)[1].intermediate
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = torch.sin


@change("activation-of-another-name")
def _(model):
    from transformers.activations import ACT2FN

    for layer in layers(model):
        layer.intermediate.intermediate_act_fn = ACT2FN["silu"]


for _name in ("attention.output.LayerNorm", "output.LayerNorm"):
    add(f"eps-of-{_name}", lambda m, n=_name: setattr(layers(m)[1].get_submodule(n), "eps", 0.5))
add("eps-of-embeddings.LayerNorm", lambda m: setattr(part(m, "embeddings.LayerNorm"), "eps", 0.5))
add(
    "eps-of-every-norm",
    lambda m: [setattr(x, "eps", 0.1) for x in m.modules() if isinstance(x, nn.LayerNorm)] and None,
)
add("scaling-of-one-layer", lambda m: setattr(part(m, SELF), "scaling", 1.0))
add(
    "scaling-of-every-layer",
    lambda m: [setattr(x.attention.self, "scaling", 1.0) for x in layers(m)] and None,
)
add("head-size-of-one-layer", lambda m: setattr(part(m, SELF), "attention_head_size", 16), may_refuse=True)
add(
    "head-size-of-every-layer",
    lambda m: [setattr(x.attention.self, "attention_head_size", 16) for x in layers(m)] and None,
    may_refuse=True,
)
add(
    "number-of-heads-of-a-layer-which-nobody-reads",
    lambda m: setattr(part(m, SELF), "num_attention_heads", 2),
    visible=False,
)
add(
    "self-attention-called-causal",
    lambda m: setattr(part(m, SELF), "is_causal", True),
    visible=False,
    may_refuse=True,
)


@change("heads-pruned-by-hand", may_refuse=True)
def _(model):
    attention = layers(model)[1].attention
    for name in ("query", "key", "value"):
        old, new = getattr(attention.self, name), nn.Linear(32, 24)
        new.load_state_dict({"weight": old.weight[8:], "bias": old.bias[8:]})
        setattr(attention.self, name, new)
    old, new = attention.output.dense, nn.Linear(24, 32)
    new.load_state_dict({"weight": old.weight[:, 8:], "bias": old.bias})
    attention.output.dense = new
    attention.self.num_attention_heads, attention.self.all_head_size = 3, 24


@change("wider-feed-forward-in-one-layer")
def _(model):
    layer = layers(model)[1]
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 96), nn.Linear(96, 32)


@change("linear-replaced")
def _(model):
    put(model, DENSE, nn.Linear(64, 32))


@change("linear-without-bias")
def _(model):
    put(model, DENSE, nn.Linear(64, 32, bias=False))


@change("bias-set-to-none")
def _(model):
    part(model, DENSE).bias = None


@change("linear-in-a-sequence")
def _(model):
    put(model, DENSE, nn.Sequential(part(model, DENSE), Twice()))


@change("linear-with-an-adapter-by-hand")
def _(model):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.3 * torch.roll(x[..., :32], 1, -1)

    module = Adapted(64, 32)
    module.load_state_dict(part(model, DENSE).state_dict())
    put(model, DENSE, module)


@change("weight-with-its-own-torch-function", may_refuse=True)
def _(model):
    class Doubled(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            plain = result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
            return 2 * plain if function is nn.functional.linear else plain

    module = part(model, DENSE)
    module.weight = Doubled(module.weight.detach())


@change("norm-is-rms")
def _(model):
    put(model, NORM, nn.RMSNorm(32))


@change("norm-without-weights")
def _(model):
    put(model, NORM, nn.LayerNorm(32, elementwise_affine=False))


@change("norm-without-bias")
def _(model):
    put(model, NORM, nn.LayerNorm(32, bias=False))


@change("dropouts-are-identities", visible=False)
def _(model):
    for layer in layers(model):
        layer.output.dropout = layer.attention.output.dropout = nn.Identity()


@change("dropout-replaced-by-a-module-that-does-something")
def _(model):
    layers(model)[1].output.dropout = Twice()


@change("dropout-of-embeddings-replaced")
def _(model):
    put(model, "embeddings.dropout", Twice())


DROPOUTS = ("attention.output.dropout", "output.dropout")


@change("dropouts-of-probability-one-in-train-mode")
def _(model):
    """All that passes them is zero, so that chance has no part."""
    for layer in layers(model):
        for name in DROPOUTS:
            layer.get_submodule(name).p = 1.0
            layer.get_submodule(name).train()


@change("one-dropout-of-probability-one-in-train-mode")
def _(model):
    dropout = layers(model)[1].output.dropout
    dropout.p = 1.0
    dropout.train()


@change("dropout-of-embeddings-of-probability-one-in-train-mode")
def _(model):
    dropout = part(model, "embeddings.dropout")
    dropout.p = 1.0
    dropout.train()


@change("dropout-of-self-attention-in-train-mode", visible=False)
def _(model):
    """Hugging Face asks the attention whether it is training, not its dropout."""
    for layer in layers(model):
        layer.attention.self.dropout.p = 1.0
        layer.attention.self.dropout.train()


@change("probability-of-dropout-in-eval-mode", visible=False)
def _(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0


@change("one-layer-in-train-mode-without-dropout", visible=False)
def _(model):
    layers(model)[1].train()


@change("train-mode-without-dropout", visible=False)
def _(model):
    model.train()


@change("train-and-eval-again", visible=False)
def _(model):
    model.train()
    model.eval()


@change("encoder-cut-to-one-layer")
def _(model):
    encoder_of(model).encoder.layer = layers(model)[:1]


@change("encoder-cut-by-a-new-list")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList([layers(model)[1]])


@change("encoder-without-layers")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList()


@change("layer-deleted")
def _(model):
    del layers(model)[1]


@change("layers-reversed")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList(reversed(layers(model)))


@change("layers-exchanged")
def _(model):
    stack = layers(model)
    stack[0], stack[1] = stack[1], stack[0]


@change("layer-repeated")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList([layers(model)[i] for i in (0, 1, 1, 0)])


@change("layer-appended")
def _(model):
    layers(model).append(layers(other(model))[0])


@change("layer-inserted")
def _(model):
    layers(model).insert(1, layers(other(model))[0])


@change("layer-replaced")
def _(model):
    layers(model)[1] = layers(other(model))[1]


@change("layer-that-gives-back-its-input", may_refuse=True)
def _(model):
    class Skip(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    layers(model)[1] = Skip()


@change("layer-of-another-model-type")
def _(model):
    from integrations.change import small

    layers(model)[1] = layers(small("roberta", seed=1))[1]


@change("encoder-replaced")
def _(model):
    encoder_of(model).encoder = encoder_of(other(model)).encoder


@change("embeddings-replaced")
def _(model):
    encoder_of(model).embeddings = encoder_of(other(model)).embeddings


@change("bare-encoder-replaced")
def _(model):
    setattr(model, model.base_model_prefix, encoder_of(other(model)))


@change("head-replaced")
def _(model):
    model.classifier = nn.Linear(32, 3)


@change("head-of-two-layers")
def _(model):
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


@change("pooler-replaced", task="ForSequenceClassification")
def _(model):
    encoder_of(model).pooler = copy.deepcopy(encoder_of(other(model)).pooler)


@change("pooler-removed", task="Model", visible=False)
def _(model):
    encoder_of(model).pooler = None


@change("pooler-that-means", task="ForSequenceClassification", may_refuse=True)
def _(model):
    """Reads padding positions, whose states a swapped model does not compute."""

    class Mean(nn.Module):
        def forward(self, hidden_states):
            return hidden_states.mean(1)

    encoder_of(model).pooler = Mean()


@change("weight-norm")
def _(model):
    parametrizations.weight_norm(part(model, DENSE))
    part(model, DENSE).parametrizations.weight.original0.data.mul_(2)


@change("spectral-norm")
def _(model):
    parametrizations.spectral_norm(part(model, DENSE)).eval()


@change("orthogonal")
def _(model):
    parametrizations.orthogonal(part(model, SELF).query)


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


@change("parametrization-of-a-linear")
def _(model):
    parametrize.register_parametrization(part(model, DENSE), "weight", Tripled())


@change("parametrization-of-a-norm")
def _(model):
    parametrize.register_parametrization(part(model, NORM), "weight", Tripled())


@change("parametrization-of-word-embeddings")
def _(model):
    parametrize.register_parametrization(part(model, "embeddings.word_embeddings"), "weight", Tripled())


@change("parametrization-put-on-and-left-in-the-weight", weights=True)
def _(model):
    parametrize.register_parametrization(part(model, DENSE), "weight", Tripled())
    ask(model)
    parametrize.remove_parametrizations(part(model, DENSE), "weight", leave_parametrized=True)


@change("old-weight-norm")
def _(model):
    nn.utils.weight_norm(part(model, DENSE))
    part(model, DENSE).weight_g.data.mul_(2)


@change("old-spectral-norm")
def _(model):
    nn.utils.spectral_norm(part(model, DENSE)).eval()


@change("pruned-by-size")
def _(model):
    for layer in layers(model):
        prune.l1_unstructured(layer.output.dense, "weight", 0.5)


@change("pruned-in-rows")
def _(model):
    prune.ln_structured(part(model, DENSE), "weight", 0.5, n=2, dim=0)


@change("pruned-everywhere")
def _(model):
    linears = [(x, "weight") for x in layers(model).modules() if isinstance(x, nn.Linear)]
    prune.global_unstructured(linears, prune.L1Unstructured, amount=0.5)


@change("pruned-for-good", weights=True)
def _(model):
    prune.l1_unstructured(part(model, DENSE), "weight", 0.5)
    ask(model)
    prune.remove(part(model, DENSE), "weight")


@change("position-ids-replaced")
def _(model):
    encoder_of(model).embeddings.position_ids = torch.arange(40).flip(0).unsqueeze(0)


@change("position-ids-written")
def _(model):
    encoder_of(model).embeddings.position_ids.copy_(torch.arange(40).flip(0))


@change("token-type-ids-replaced")
def _(model):
    encoder_of(model).embeddings.token_type_ids = torch.ones(1, 40, dtype=torch.long)


@change("token-type-ids-written")
def _(model):
    encoder_of(model).embeddings.token_type_ids.fill_(1)


@change("token-type-ids-deleted", visible=False)
def _(model):
    del encoder_of(model).embeddings.token_type_ids


@change("token-type-ids-replaced-in-roberta", kind="roberta")
def _(model):
    encoder_of(model).embeddings.token_type_ids = torch.ones(1, 40, dtype=torch.long)


@change("padding-index-of-roberta", kind="roberta")
def _(model):
    encoder_of(model).embeddings.padding_idx = 5


@change("max-norm-of-word-embeddings", may_refuse=True)
def _(model):
    part(model, "embeddings.word_embeddings").max_norm = 0.5


@change("quantize-dynamic", may_refuse=True, slack=10000, visible=False)
def _(model):
    """Padding takes part in the range that Hugging Face's batch is rounded to, hence the slack."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(encoder_of(model), {nn.Linear}, torch.qint8, inplace=True)
