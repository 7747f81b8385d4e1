"""The search for good fixed paths, on a model whose best paths are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynplan.policies import FixedPath, KeepAll
from dynplan.search import search_static_path

pytestmark = pytest.mark.usefixtures("one_thread")
WORTH = torch.tensor([5.0, 1.0, 4.0, 0.5, 3.0])


class Toy(nn.Module):
    """Its loss falls by what each kept layer is worth; layers 0 and 2 are worth less together."""

    def __init__(self):
        super().__init__()
        self.dynplan = SimpleNamespace(num_layers=5, policy=KeepAll(), budget=0.5)
        self.calls = 0

    def forward(self, labels=None):
        assert not self.training and not torch.is_grad_enabled() and self.dynplan.budget is None
        self.calls += 1
        kept = self.dynplan.policy.kept.float()
        loss = 20 - (kept * WORTH).sum() + 3 * kept[0] * kept[2]
        return SimpleNamespace(loss=None if labels is None else loss + labels.float().mean())


def batches(count=2):
    return [dict(labels=torch.full((3,), index)) for index in range(count)]


def test_search_finds_the_best_paths_and_leaves_the_model_as_it_was():
    model = Toy().train()
    policy = model.dynplan.policy
    found = search_static_path(model, batches(), sizes=[1, 2, 4, 5], swaps=12, progress=False)
    assert found.paths == {1: (0,), 2: (0, 4), 4: (0, 1, 2, 4), 5: (0, 1, 2, 3, 4)}
    assert model.training and model.dynplan.policy is policy and model.dynplan.budget == 0.5


def test_search_by_another_cost():
    worth = torch.tensor([0.0, 3.0, 0.0, 5.0, 1.0])

    def cost(model, given):
        assert len(given) == 2 and not model.training
        return -float(worth[model.dynplan.policy.kept].sum())

    model = Toy()
    found = search_static_path(model, batches(), sizes=[1, 2], swaps=4, progress=False, cost=cost)
    assert found.paths == {1: (3,), 2: (1, 3)} and model.calls == 0


def test_each_set_of_layers_is_tried_once():
    model = Toy()
    search_static_path(model, batches(1), sizes=[1], swaps=200, progress=False)
    assert model.calls <= 5 + 4 + 3 + 2 + 5


def test_search_is_repeatable_and_restores_after_a_failure():
    first, second = (
        search_static_path(Toy(), batches(), sizes=[3], swaps=2, seed=4, progress=False).paths
        for _ in range(2)
    )
    assert first == second
    model = Toy().train()
    with pytest.raises(ValueError, match="expected the forward to return a loss; do the batches hold labels"):
        search_static_path(model, [dict()], sizes=[3], progress=False)
    assert type(model.dynplan.policy) is KeepAll and model.training


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="expected model to be swapped"):
        search_static_path(nn.Linear(1, 1), batches(), [1])
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        search_static_path(Toy(), [], [1])
    for sizes in ([], [0], [6]):
        with pytest.raises(ValueError, match="expected sizes within 1..5, got"):
            search_static_path(Toy(), batches(), sizes)


@torch.no_grad()
def test_search_on_a_swapped_model():
    from integrations.models import batch, tiny

    import dynplan

    model = dynplan.swap(tiny())
    given = {**batch(), "labels": torch.tensor([0, 1, 2, 0, 1])}
    found = search_static_path(model, [given], sizes=[2], swaps=6, progress=False).paths[2]

    def loss(layers):
        model.dynplan.policy = FixedPath([index in layers for index in range(4)])
        return model(**given).loss

    assert loss(found) <= max(loss(pair) for pair in ((0, 1), (0, 2), (1, 3), (2, 3)))
