"""What the check before each forward rests on: entries of dictionaries and tensors that have not changed."""

import copy
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import KINDS, tiny

from dynplan import _native
from dynplan.integrations.embeddings import PlainEmbeddings


class Thing:
    pass


def test_entries():
    first, second, empty, thing = Thing(), Thing(), OrderedDict(), Thing()
    thing.training = False
    table = {"a": first, "b": second}
    lists = [table, table, vars(thing)], ["a", "b", "training"], [first, second, False], [empty]
    entries = _native.Entries(*lists)
    lists[0].clear()
    assert entries.same() and entries.same()
    for change, back in (
        (lambda: table.update(b=first), lambda: table.update(b=second)),
        (lambda: table.pop("b"), lambda: table.update(b=second)),
        (lambda: table.clear(), lambda: table.update(a=first, b=second)),
        (lambda: empty.update({0: 0}), lambda: empty.clear()),
        (lambda: setattr(thing, "training", True), lambda: setattr(thing, "training", False)),
        (lambda: delattr(thing, "training"), lambda: setattr(thing, "training", False)),
    ):
        change()
        assert not entries.same() and not entries.same()
        back()
        assert entries.same()
    table["c"] = first  # not ours
    assert entries.same()


def test_entries_are_no_secret_to_the_garbage_collector():
    thing = Thing()
    thing.table = {"thing": thing}
    thing.entries = _native.Entries([thing.table], ["thing"], [thing], [])
    assert thing.entries.same()
    left = weakref.ref(thing)
    del thing
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(
    ("lists", "error"),
    [
        (([{}], [], [], []), ValueError),
        (([1], ["a"], [1], []), TypeError),
        (([{}], [[]], [1], []), TypeError),
        (([], [], [], [1]), TypeError),
    ],
)
def test_entries_refuse(lists, error):
    with pytest.raises(error):
        _native.Entries(*lists).same()


def write(tensor):
    tensor.add_(1)


def move(tensor):
    tensor.data = tensor.data.clone()


@pytest.mark.parametrize("change", [write, move])
def test_weight_watch(change):
    tensors = [torch.zeros(3) for _ in range(4)]
    watch = torch.classes.dynplan.WeightWatch(tensors)
    tensors[0].sum()
    assert watch.unchanged()
    change(tensors[2])
    assert not watch.unchanged()


def test_weight_watch_without_versions():
    with torch.inference_mode():
        tensor = torch.zeros(3)
    watch = torch.classes.dynplan.WeightWatch([tensor])
    assert watch.unchanged()
    with torch.inference_mode():
        tensor.set_(torch.ones(3))
    assert not watch.unchanged()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_plain_embeddings(kind):
    module = tiny(kind, "Model").embeddings
    plain = PlainEmbeddings(module)
    assert plain.serves(None, None)
    assert not plain.serves(torch.zeros(1, 1), None)
    assert not plain.serves(None, torch.zeros(1, 1, 1))
    ids, types = torch.randint(0, 9, (3, 7)), torch.randint(0, 2, (3, 7))  # some of them padding's
    exact = copy.deepcopy(module).double()
    mask = torch.tensor([[1] * 7, [0, 1, 1, 0, 1, 0, 0], [0] * 7])
    for given in (None, types):
        theirs, right = module(ids, given), exact(ids, given)
        assert_close_to_exact(plain(ids, None, given).hidden, theirs.flatten(0, 1), right.flatten(0, 1))
        real = mask.bool()
        assert_close_to_exact(plain(ids, mask, given).hidden, theirs[real], right[real])
    with torch.enable_grad():
        assert not plain.serves(None, None)
    hook = module.LayerNorm.register_forward_hook(lambda *_: None)
    assert not plain.serves(None, None)
    hook.remove()
    assert plain.serves(None, None)
    module.LayerNorm.eps = exact.LayerNorm.eps = 1.0
    assert plain.serves(None, None)
    theirs, right = module(ids, types), exact(ids, types)
    assert_close_to_exact(plain(ids, None, types).hidden, theirs.flatten(0, 1), right.flatten(0, 1))
    module.word_embeddings = torch.nn.Sequential(module.word_embeddings)
    assert not plain.serves(None, None)
