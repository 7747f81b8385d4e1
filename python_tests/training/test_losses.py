import pytest
import torch

from dynplan.training.data import Task
from dynplan.training.losses import draw_paths, path_divergence, path_sizes, sample_losses
from dynplan.training.menu import candidate_paths, choose_menu

CLASSES = Task("auto", "classification", (0, 1, 2), "accuracy")
SCORES = Task("auto", "regression", (), "pearson+spearman")


def test_losses_by_hand():
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    want = -logits.log_softmax(1)[range(2), labels]
    torch.testing.assert_close(sample_losses(CLASSES, logits, labels), want)
    torch.testing.assert_close(
        sample_losses(SCORES, torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0])),
        torch.tensor([4.0, 0.0]),
    )


def test_divergence_from_the_full_path():
    full = torch.randn(5, 3, requires_grad=True)
    path = torch.randn(5, 3, requires_grad=True)
    found = path_divergence(CLASSES, path, full)
    p, q = full.softmax(1), path.softmax(1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(1))
    found.sum().backward()
    assert full.grad is None and path.grad.abs().sum() > 0
    assert path_divergence(CLASSES, full, full).abs().max() < 1e-6


@pytest.mark.parametrize(("layers", "want"), [(12, (5, 10)), (6, (3, 5)), (1, (1, 1))])
def test_path_sizes(layers, want):
    assert path_sizes(layers, 0.4, 0.9) == want


def test_drawn_paths_cover_sizes_and_layers():
    paths = draw_paths(4000, 6, (3, 5))
    sizes = paths.sum(1)
    assert set(sizes.tolist()) == {3, 4, 5}
    assert all(abs(float((sizes == k).float().mean()) - 1 / 3) < 0.04 for k in (3, 4, 5))
    assert (paths.float().mean(0) - 4 / 6).abs().max() < 0.04


def test_candidates_start_with_the_fixed_paths():
    table = candidate_paths({3: (0, 1, 5), 4: (0, 1, 2, 5)}, 6, 10, seed=0)
    assert table[:3].tolist() == [
        [True, True, False, False, False, True],
        [True, True, True, False, False, True],
        [True] * 6,
    ]
    assert len(table) == 13 == len({tuple(path) for path in table.tolist()})


def test_menu_takes_what_complements():
    paths = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
    # Path 2 is good where path 0 is bad; path 1 is never better than path 0.
    qualities = torch.tensor([[0.9, 0.8, 0.0, 0.9], [0.0, 0.0, 0.9, 0.9]])
    assert choose_menu(qualities, paths, 2, fixed=1).tolist() == paths[[0, 2]].tolist()
