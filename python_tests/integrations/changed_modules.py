"""Changes to the modules inside a layer: their settings, their kinds, their parametrizations."""

import torch
from integrations.change import add, ask, change, encoder_of, layers, part, put
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

DENSE = "encoder.layer.1.output.dense"
NORM = "encoder.layer.1.output.LayerNorm"
SELF = "encoder.layer.1.attention.self"


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


@change("quantize-dynamic", may_refuse=True, slack=10000, visible=False)
def _(model):
    """Padding takes part in the range that Hugging Face's batch is rounded to, hence the slack."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(encoder_of(model), {nn.Linear}, torch.qint8, inplace=True)
