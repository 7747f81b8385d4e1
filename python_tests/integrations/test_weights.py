"""What the check before each forward rests on: entries of dictionaries and tensors that have not changed."""

import copy

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import KINDS, tiny

from dynplan import _native
from dynplan.integrations.embeddings import PlainEmbeddings


def test_same_entries():
    first, second, empty = object(), object(), {}
    table = {"a": first, "b": second}
    lists = [table, table], ["a", "b"], [first, second], [empty]
    assert _native.same_entries(*lists)
    table["b"] = first
    assert not _native.same_entries(*lists)
    del table["b"]
    assert not _native.same_entries(*lists)
    table["b"] = second
    empty[0] = 0
    assert not _native.same_entries(*lists)


@pytest.mark.parametrize(
    ("lists", "error"),
    [
        (([{}], [], [], []), ValueError),
        (([1], ["a"], [1], []), TypeError),
        (([{}], [[]], [1], []), TypeError),
        (([], [], [], [1]), TypeError),
    ],
)
def test_same_entries_refuses(lists, error):
    with pytest.raises(error):
        _native.same_entries(*lists)


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
    eps, module.LayerNorm.eps = module.LayerNorm.eps, 1.0
    assert not plain.serves(None, None)
    module.LayerNorm.eps = eps
    module.word_embeddings = torch.nn.Sequential(module.word_embeddings)
    assert not plain.serves(None, None)
