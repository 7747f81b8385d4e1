"""DYNPLAN_REGION_METHOD forces the loop that sums the windows: every one gives the same loss and gradient."""

import pytest
import torch
from helpers import assert_same_but_for_order

from dynplan.ops import region_cross_entropy

METHODS = ("small", "general")


def value_and_gradient(input, target, **options):
    leaf = input.clone().requires_grad_()
    loss = region_cross_entropy(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("merge", ["logits", "probs"])
def test_every_method_gives_one_result(monkeypatch, kernel_size, merge):
    torch.manual_seed(0)
    input = torch.randn(2, 5, 50, 70)
    target = torch.randint(5, (2, 10, 10)).repeat_interleave(5, 1).repeat_interleave(7, 2)
    options = {"kernel_size": kernel_size, "merge": merge}
    expected = value_and_gradient(input, target, **options)
    for method in METHODS:
        monkeypatch.setenv("DYNPLAN_REGION_METHOD", method)
        for got, wanted in zip(value_and_gradient(input, target, **options), expected, strict=True):
            assert_same_but_for_order(got, wanted)


def test_methods_are_different_loops(monkeypatch):
    """Sums are taken in another order, so that some last bit differs; else nothing was forced."""
    torch.manual_seed(0)
    input, target = torch.randn(1, 5, 90, 90), torch.randint(5, (1, 30, 30))
    target = target.repeat_interleave(3, 1).repeat_interleave(3, 2)
    gradients = {}
    for method in METHODS:
        monkeypatch.setenv("DYNPLAN_REGION_METHOD", method)
        gradients[method] = value_and_gradient(input, target, kernel_size=3)[1]
    assert not torch.equal(gradients["small"], gradients["general"])


def test_unknown_method_is_refused(monkeypatch):
    monkeypatch.setenv("DYNPLAN_REGION_METHOD", "pairs")
    message = "expected DYNPLAN_REGION_METHOD to be small or general, got pairs"
    with pytest.raises(ValueError, match=message):
        region_cross_entropy(torch.randn(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long))
