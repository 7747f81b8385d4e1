"""Changes that hide from a look at names, modules of origin, counts or addresses."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from integrations.models import batch, tiny
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.bert import modeling_bert

import dynplan

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = batch()
MASK = INPUTS["attention_mask"].bool()


@torch.no_grad()
def states(model, **options):
    return model(**INPUTS | options).last_hidden_state[MASK]


def pair():
    """A swapped model that has run twice, and its twin."""
    model = tiny(task="Model")
    twin = copy.deepcopy(model)
    dynplan.swap(model)
    states(model)
    states(model)
    return model, twin


def layers(model):
    return model.encoder.layer


def doubled(function):
    @functools.wraps(function)
    def wrapper(*arguments, **options):
        result = function(*arguments, **options)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return wrapper


def cut_feed_forward(model):
    up, down = layers(model)[0].intermediate.dense, layers(model)[0].output.dense
    up.weight.data, up.bias.data = up.weight.data[:32], up.bias.data[:32]
    down.weight.data = down.weight.data[:, :32]


def transpose(model):
    weight = layers(model)[0].attention.self.query.weight
    weight.data = weight.data.t()


def one_position_for_all(model):
    ids = model.embeddings.position_ids
    ids.data = ids.data[:, :1].expand(ids.shape)


def one_element_of_a_buffer(model):
    model.embeddings.token_type_ids.data[0, 3] = 1


def causal_by_default(model):
    for layer in layers(model):
        del layer.attention.self.is_causal


def softmax_over_tokens(model):
    layers(model)[0].intermediate.intermediate_act_fn = nn.Softmax(dim=1)


def another_pooler(model):
    model.pooler = None


CHANGES = [
    cut_feed_forward,
    transpose,
    one_position_for_all,
    one_element_of_a_buffer,
    causal_by_default,
    softmax_over_tokens,
    another_pooler,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed(change):
    model, twin = pair()
    change(model), change(twin)
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


CLASSES = ("BertLayer", "BertAttention", "BertSelfAttention", "BertSelfOutput", "BertEmbeddings")


@pytest.mark.parametrize("name", CLASSES)
def test_wrapped_forward_of_a_class(name, monkeypatch):
    model, twin = pair()
    kind = getattr(modeling_bert, name)
    monkeypatch.setattr(kind, "forward", doubled(kind.forward))
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)
    fresh = dynplan.swap(copy.deepcopy(twin))
    torch.testing.assert_close(states(fresh), states(twin), rtol=1e-4, atol=1e-4)


def test_wrapped_forward_of_the_model_is_refused(monkeypatch):
    model, _ = pair()
    monkeypatch.setattr(modeling_bert.BertModel, "forward", doubled(modeling_bert.BertModel.forward))
    with pytest.raises(NotImplementedError, match="expected BertModel's own forward"):
        states(model)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, modeling_bert.BertLayer])
def test_call_of_a_class(kind, monkeypatch):
    model, twin = pair()
    monkeypatch.setattr(kind, "__call__", doubled(kind.__call__), raising=False)
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


def test_another_class_under_a_name_of_transformers(monkeypatch):
    class Mine(modeling_bert.BertIntermediate):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    monkeypatch.setattr(modeling_bert, "BertIntermediate", Mine)
    twin = tiny(task="Model")
    model = dynplan.swap(copy.deepcopy(twin))
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "layer_norm", "scaled_dot_product_attention", "gelu"])
def test_functions_of_torch(name, monkeypatch):
    model, twin = pair()
    if name == "gelu":
        for one in (model, twin):
            for layer in layers(one):
                layer.intermediate.intermediate_act_fn = nn.GELU()
    monkeypatch.setattr(F, name, doubled(getattr(F, name)))
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


def test_masks_of_ones_own(monkeypatch):
    model, twin = pair()

    def first_half(*arguments, **options):
        mask = original(*arguments, **options | {"allow_is_bidirectional_skip": False})
        mask = mask.clone()
        mask[..., mask.shape[-1] // 2 :] = False
        return mask

    original = AttentionMaskInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", first_half)
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.linear else result


def test_function_modes():
    model, twin = pair()
    with Doubling():
        ours, theirs = states(model), states(twin)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "TorchFunctionMode" in model.dynplan.why_not_fused
    with torch.device("cpu"):
        states(model)
    assert model.dynplan.why_not_fused is None


def test_forward_mode_gradients():
    found = []
    for model in pair():
        model.set_attn_implementation("eager")
        model.requires_grad_(False)
        given = torch.randn(5, 9, 32, generator=torch.Generator().manual_seed(0))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(given, torch.ones_like(given))
            output = model(inputs_embeds=dual)[0]
            found.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_global_backward_hooks():
    gradients = []
    for model in pair():
        kind = type(layers(model)[0])

        def hook(module, before, after, kind=kind):
            if not isinstance(module, kind):
                return None
            return tuple(None if one is None or not one.is_floating_point() else 2 * one for one in before)

        with contextlib.closing(Handle(nn.modules.module.register_module_full_backward_hook(hook))):
            model(**INPUTS).last_hidden_state[MASK].sum().backward()
        gradients.append(layers(model)[0].output.dense.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


class Handle:
    def __init__(self, handle):
        self.close = handle.remove


def test_gradients_that_a_hook_asks_for():
    model = dynplan.swap(tiny(task="Model").requires_grad_(False))
    model.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    output = model(**INPUTS).last_hidden_state
    assert output.requires_grad and "gradients" in model.dynplan.why_not_fused


def test_a_sleeping_hook_exchanged_for_another():
    model = tiny(task="Model")
    with torch.no_grad():
        model(**INPUTS, output_hidden_states=True)
    twin = copy.deepcopy(model)
    dynplan.swap(model)
    states(model)
    for one in (model, twin):
        hooks = layers(one)[0]._forward_hooks
        hooks.clear()
        layers(one)[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(states(model), states(twin), rtol=1e-4, atol=1e-4)


def test_a_pooler_added_later():
    model = dynplan.swap(modeling_bert.BertModel(tiny().config, add_pooling_layer=False).eval())
    model.pooler = modeling_bert.BertPooler(model.config)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="the first token of every sample"):
        model(**batch(side="left"))


def test_parts_of_adapters():
    from peft import LoraConfig, get_peft_model

    found = []
    for one in pair():
        adapted = get_peft_model(one, LoraConfig(target_modules=["query"], init_lora_weights=False))
        query = layers(adapted.base_model.model)[0].attention.self.query
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            nn.init.normal_(parameter, std=0.3)
        own = query.base_layer.forward
        query.base_layer.forward = lambda rows, own=own: own(rows) + rows.mean(-2, keepdim=True)
        found.append(states(adapted.eval()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_projection_that_mixes_tokens():
    found = []
    for swapped in (True, False):
        model = tiny("electra", "Model")
        model = dynplan.swap(model) if swapped else model
        states(model)
        model.embeddings_project.register_forward_hook(
            lambda module, inputs, output: output + output.mean(-2, keepdim=True)
        )
        found.append(states(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_attributes_that_swap_would_overwrite():
    model = tiny()
    model.save_pretrained = print
    with pytest.raises(ValueError, match="without an attribute save_pretrained"):
        dynplan.swap(model)
