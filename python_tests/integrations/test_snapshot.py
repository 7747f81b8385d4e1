"""What the check before each forward rests on: objects and tensors that have not changed, models as read."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from dynplan._C import attributes_are, dicts_are, entries_are, sizes_are, types_are, weights_are_unchanged
from helpers import assert_close_to_exact
from integrations.models import KINDS, encoder_of, tiny
from torch import nn

import dynplan
from dynplan.ops.embed_tokens import embed_tokens
from dynplan.ops.packed_weights import Watched
from dynplan.snapshot import ModuleSnapshot


def test_object_checks():
    table, other = {"a": 1, "b": None}, {}
    assert types_are((table, 1), (dict, int)) and not types_are((table, 1), (dict, dict))
    assert sizes_are((table, other), (2, 0)) and not sizes_are((table, other), (2, 1))
    assert entries_are((table, table), ("a", "b"), (1, None))
    assert entries_are((other,), ("a",), (None,)), "a missing entry counts as None"
    assert dicts_are((norm,), (vars(norm),)) and not dicts_are((norm,), ({},))
    assert attributes_are((norm,), ("__name__",), (norm.__name__,))
    assert not attributes_are((norm,), ("__name__",), (norm,)) and not attributes_are((1,), ("a",), (None,))
    assert not entries_are((table,), ("a",), (2,)) and not entries_are((other,), ("a",), (1,))


def test_handles_of_watches():
    watched = Watched([torch.zeros(3)])
    handle = watched._handle
    assert weights_are_unchanged(handle) is True
    watched._tensors[0].add_(1)
    assert weights_are_unchanged(handle) is False
    del watched
    for none in (handle, -1):
        with pytest.raises(ValueError, match=f"expected a WeightWatch's handle, got {none}"):
            weights_are_unchanged(none)
    for other in ("1", 2**70):
        with pytest.raises((TypeError, OverflowError)):
            weights_are_unchanged(other)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (types_are, ((1,),)),
        (types_are, ((1,), ())),
        (types_are, ([1], [int])),
        (dicts_are, ((1,), ({},))),
        (sizes_are, ((1,), (1,))),
        (sizes_are, (({},), ("a",))),
        (entries_are, (({},), ([],), (1,))),
        (entries_are, ((1,), ("a",), (1,))),
        (entries_are, (({},), ("a",))),
        (attributes_are, ((1,), (2,), (3,))),
    ],
)
def test_object_checks_refuse(check, arguments):
    with pytest.raises((TypeError, AttributeError)):
        check(*arguments)


def norm():
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Dropout())


CHANGES = {
    "class": lambda model: setattr(model[0], "__class__", nn.Identity),
    "attribute": lambda model: setattr(model[1], "eps", 0.5),
    "one more attribute": lambda model: setattr(model[1], "other", 0.5),
    "forward": lambda model: setattr(model[0], "forward", model[0].forward),
    "child": lambda model: model.__setitem__(0, nn.Linear(3, 3)),
    "parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(3, 3))),
    "no parameter": lambda model: setattr(model[0], "bias", None),
    "buffer": lambda model: model[0].register_buffer("b", torch.ones(1)),
    "hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: model[0].register_forward_pre_hook(lambda *_: None),
    "dropout": lambda model: model[2].train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_module_snapshot(change):
    model = norm().eval()
    if change is CHANGES["buffer"]:
        model[0].register_buffer("b", torch.zeros(1))
    snapshot = ModuleSnapshot(model.modules())
    assert snapshot.holds()
    model(torch.zeros(1, 3))
    assert snapshot.holds()
    change(model)
    assert not snapshot.holds()


def test_module_snapshot_sees_more_layers_and_forwards_of_classes(monkeypatch):
    layers = nn.ModuleList([norm()])
    snapshot = ModuleSnapshot(layers.modules(), [({"a": 1}, "a")])
    assert snapshot.holds()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert not snapshot.holds()
    assert snapshot.holds()
    layers.append(norm())
    assert not snapshot.holds()


def test_snapshots_are_no_secret_to_the_garbage_collector():
    model = dynplan.swap(tiny())
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


WRITES = {
    "in place": lambda tensor: tensor.add_(1),
    "data": lambda tensor: tensor.data.add_(1),
    "other data": lambda tensor: setattr(tensor, "data", tensor.data.clone()),
    "set": lambda tensor: tensor.set_(torch.ones(5)),
    "numpy": lambda tensor: tensor.numpy().__iadd__(1),
    "shared": lambda tensor: tensor.share_memory_(),
    "swapped": lambda tensor: torch.utils.swap_tensors(tensor, torch.ones(5)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_watched(write):
    tensors = [torch.zeros(5) for _ in range(60)]
    watch = Watched(tensors)
    tensors[0].sum()
    assert watch.unchanged()
    write(tensors[2])
    assert not watch.unchanged()


def test_watched_of_any_strides_and_dtypes():
    for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.complex128):
        tensor = torch.zeros(7, 9, dtype=dtype).t()[::2]
        watch = Watched([tensor, torch.zeros(0), torch.zeros((), dtype=dtype)])
        assert watch.unchanged()
        tensor.data.fill_(1)
        assert not watch.unchanged()


def test_watched_without_versions():
    with torch.inference_mode():
        tensor = torch.zeros(3)
        watch = Watched([tensor])
        assert watch.unchanged()
        tensor.fill_(1)
    assert not watch.unchanged()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_as_read(kind):
    model = dynplan.swap(tiny(kind))
    module = encoder_of(model).embeddings
    ids, types = torch.randint(0, 9, (3, 7)), torch.randint(0, 2, (3, 7))  # some of them padding's
    exact = copy.deepcopy(module).double()
    mask = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 0, 0], [0] * 7])
    read = model.dynplan.state().embeddings
    for given in (None, types):
        theirs, right = module(ids, given), exact(ids, given)
        ours = embed_tokens(ids, None, given, *read).hidden
        assert_close_to_exact(ours, theirs.flatten(0, 1), right.flatten(0, 1))
        ours = embed_tokens(ids, mask, given, *read).hidden
        assert_close_to_exact(ours, theirs[mask.bool()], right[mask.bool()])
    module.LayerNorm.eps = 1.0
    assert model.dynplan.state().embeddings[5] == 1.0
    module.token_type_ids.fill_(1)
    assert model.dynplan.state().embeddings is None


def _linear_hook(module, grad_input, grad_output):
    module.seen = True


def test_a_backward_hook_is_called_from_the_first_backward_on():
    model = dynplan.swap(tiny())
    with torch.no_grad():
        model(torch.full((1, 3), 5))
    layer = encoder_of(model).encoder.layer[1]
    layer.register_full_backward_hook(_linear_hook)
    model(torch.full((1, 3), 5)).logits.sum().backward()
    assert layer.seen


@pytest.mark.parametrize("name", ["apply_chunking_to_forward", "eager_attention_forward"])
@torch.no_grad()
def test_functions_of_the_code_of_a_family(name, monkeypatch):
    model, twin = tiny(), tiny()
    for one in (model, twin):
        one.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7]])
    dynplan.swap(model)(ids)

    def doubled(*arguments, **options):
        result = original(*arguments, **options)
        return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result

    original = getattr(transformers.models.bert.modeling_bert, name)
    before = twin(ids).logits
    monkeypatch.setattr(transformers.models.bert.modeling_bert, name, doubled)
    theirs = twin(ids).logits
    assert not torch.allclose(theirs, before)
    torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-4, atol=1e-4)
