"""Loss and gradient in one pass: what float32 logits on CPU that require a gradient get."""

import pytest
import torch
from helpers import assert_same_but_for_order, on_threads

from dynplan.ops import region_cross_entropy, region_cross_entropy_stats

SHAPE = (2, 7, 37, 61)


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    input = 3 * torch.randn(SHAPE)
    target = torch.randint(SHAPE[1], (2, 8, 8)).repeat_interleave(5, 1).repeat_interleave(8, 2)
    return input, target[:, : SHAPE[2], : SHAPE[3]].contiguous()


def one_pass(input, target, upstream=1.0, **options):
    x = input.detach().requires_grad_()
    loss = region_cross_entropy(x, target, **options)
    assert loss.grad_fn.gradient is not None
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(upstream))[0]


def two_passes(input, target, upstream=1.0, **options):
    """Forward and backward apart, as the diagnostics have them."""
    x = input.detach().requires_grad_()
    loss = region_cross_entropy_stats(x, target, **options).loss
    assert loss.grad_fn.gradient is None
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(upstream))[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 1, "p": 1.0},
        {"kernel_size": 7, "p": 2.0},
        {"kernel_size": (3, 5), "p": 3.5},
        {"kernel_size": 15},
        {"normalize": "count", "sigma": float("inf")},
        {"p": 1.0, "reduction": "sum"},
        {"weight": torch.linspace(0.5, 2, SHAPE[1])},
        {"ignore_index": (0, 3)},
    ],
    ids=str,
)
def test_equals_forward_and_backward_apart(drawn, options):
    value, gradient = one_pass(*drawn, upstream=-2.5, **options)
    expected, expected_gradient = two_passes(*drawn, upstream=-2.5, **options)
    assert torch.equal(value, expected)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-5, atol=1e-6 * expected_gradient.abs().max()
    )


def test_channels_last(drawn):
    input, target = drawn
    value, gradient = one_pass(input.to(memory_format=torch.channels_last), target)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    expected, expected_gradient = one_pass(input, target)
    assert_same_but_for_order(value, expected)
    assert_same_but_for_order(gradient, expected_gradient)


def test_volume():
    torch.manual_seed(0)
    input, target = torch.randn(1, 4, 9, 10, 11), torch.randint(4, (1, 9, 10, 11))
    value, gradient = one_pass(input, target, kernel_size=3)
    expected, expected_gradient = two_passes(input, target, kernel_size=3)
    assert torch.equal(value, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale, p", [(300.0, 20.0), (1e-6, 5.0), (0.0, 5.0)])
def test_powers_beyond_float32(drawn, scale, p):
    """The common factor is then no float: the gradient comes from a backward of its own."""
    input, target = drawn
    logits = torch.nn.functional.one_hot(target, SHAPE[1]).permute(0, 3, 1, 2) * 30.0 + scale * input
    value, gradient = one_pass(logits, target, p=p)
    expected, expected_gradient = two_passes(logits, target, p=p)
    assert torch.equal(value, expected) and gradient.isfinite().all()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=0)


def test_nothing_valid(drawn):
    input, target = drawn
    value, gradient = one_pass(input, torch.full_like(target, -100))
    assert value == 0 and not gradient.any()


def test_same_bits_with_and_without_gradient_on_any_threads(drawn):
    results = on_threads((1, 2, 3), lambda: one_pass(*drawn))
    with torch.no_grad():
        plain = region_cross_entropy(*drawn)
    for value, gradient in results:
        assert torch.equal(value, plain) and torch.equal(gradient, results[0][1])


def test_second_backward_and_map(drawn):
    """The gradient is handed out once; a second backward makes it anew, and so does one into the losses."""
    input, target = drawn
    x = input.clone().requires_grad_()
    loss = region_cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        g.sum().backward()


def test_changed_logits_are_noticed(drawn):
    input, target = drawn
    x = input.clone().requires_grad_()
    logits = 1.0 * x
    loss = region_cross_entropy(logits, target)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_label_is_named(drawn):
    input, target = drawn
    target[1, 2, 3] = 99
    with pytest.raises(IndexError, match="got 99"):
        region_cross_entropy(input.requires_grad_(), target)


def test_opcheck(drawn):
    """Without the tests that trace or differentiate: traced graphs take forward and backward apart."""
    op = torch.ops.dynplan._region_cross_entropy_loss_and_gradient.default
    options = ([3, 3], [1, 1], [1.0, 1.0], 1.0, 5.0, "logits", "weight", [-100], 0.0, "mean")
    input, target = drawn
    torch.library.opcheck(op, (input, target, None, *options), test_utils=("test_schema", "test_faketensor"))
