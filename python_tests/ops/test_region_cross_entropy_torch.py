"""region_cross_entropy as an op: gradcheck, opcheck, compile, autocast, errors; upsampled logits included."""

import itertools

import pytest
import torch
from helpers import assert_same_but_for_order
from test_region_cross_entropy import case

from dynplan.ops import region_cross_entropy, region_cross_entropy_stats, region_cross_entropy_upsampled

OP = torch.ops.dynplan.region_cross_entropy.default


def options(
    axes=2, kernel=3, stride=1, p=5.0, merge="logits", normalize="weight", smoothing=0.0, reduction="mean"
):
    each = [1] * axes
    return (
        [kernel] * axes,
        [stride] * axes,
        [float(e) for e in each],
        1.0,
        p,
        merge,
        normalize,
        [-100],
        smoothing,
        reduction,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "p", "merge", "normalize", "smoothing"),
    [
        *itertools.product(
            (1, 3), (1, 2), (1.0, 2.5, 5.0), ("logits", "probs"), ("weight", "count"), (0.0, 0.2)
        )
    ],
)
def test_gradcheck(kernel_size, stride, p, merge, normalize, smoothing, weighted):
    input, target = case(4, 5, classes=3, batch=1, labelled=2)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if weighted else None
    torch.autograd.gradcheck(
        lambda x: region_cross_entropy(
            x, target, kernel_size, 1.0, stride, p, merge, normalize, weight, label_smoothing=smoothing
        ),
        input.requires_grad_(),
        fast_mode=True,
    )


def test_gradcheck_of_map_volume_and_upsampled():
    input, target = case(3, 3, 4, classes=2, batch=1, labelled=2)
    torch.autograd.gradcheck(
        lambda x: region_cross_entropy(x, target, 3, reduction="none"), input.requires_grad_(), fast_mode=True
    )
    low, target = case(4, 5, classes=3, batch=1)[0], case(9, 11, batch=1)[1]
    for align_corners in (False, True):
        torch.autograd.gradcheck(
            lambda x, a=align_corners: region_cross_entropy_upsampled(x, target, 3, align_corners=a),
            low.requires_grad_(),
            fast_mode=True,
        )


CHECKED = {
    "plain": (case(6, 7), None, options()),
    "weighted, smoothed": (case(6, 7), torch.ones(4, dtype=torch.float64), options(smoothing=0.1)),
    "probs, stride": (case(6, 7), None, options(merge="probs", stride=2)),
    "probs, smoothed": (case(6, 7), None, options(merge="probs", smoothing=0.1)),
    "volume, sum": (case(3, 4, 5), None, options(axes=3, p=1.0, reduction="sum")),
    "empty": ((torch.randn(0, 3, 4, 5), torch.zeros(0, 4, 5, dtype=torch.long)), None, options()),
    "bf16, channels-last": (
        (
            case(6, 7, dtype=torch.bfloat16)[0].to(memory_format=torch.channels_last),
            case(6, 7)[1].to(torch.uint8).clamp_max(3),
        ),
        None,
        options(),
    ),
}


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name, requires_grad):
    (input, target), weight, opts = CHECKED[name]
    input = input.clone().requires_grad_(requires_grad)
    torch.library.opcheck(OP, (input, target, weight, None, *opts, requires_grad))


def test_opcheck_upsampled_and_backward():
    low, target = case(3, 4)[0], case(6, 7)[1]
    torch.library.opcheck(OP, (low.requires_grad_(), target, None, False, *options(), True))
    input, target = case(6, 7)
    state = OP(input, target, None, None, *options(), False)[:4]
    one = torch.ones((), dtype=torch.float64)
    backward = torch.ops.dynplan._region_cross_entropy_backward.default
    # Forward and fake alone: the backward has no derivative of its own, and says so.
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        backward, (one, None, input, target, None, None, *state, *options()), test_utils=utils
    )
    torch.library.opcheck(
        backward, (one, state[2], input, target, None, None, *state, *options()), test_utils=utils
    )


@pytest.mark.parametrize("merge", ["logits", "probs"])
def test_fullgraph_compile(merge):
    torch._dynamo.reset()

    def loss(input, target):
        stats = region_cross_entropy_stats(input * 2, target, merge=merge)
        return stats.loss + stats.losses.mean() + region_cross_entropy(input, target, kernel_size=3, p=1.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    input, target = case(9, 10, dtype=torch.float32)
    for source in (input, input.to(memory_format=torch.channels_last)):
        eager, traced = source.clone().requires_grad_(), source.clone().requires_grad_()
        expected, got = loss(eager, target), compiled(traced, target)
        torch.testing.assert_close(got, expected)
        expected.backward()
        got.backward()
        torch.testing.assert_close(traced.grad, eager.grad)


def test_compile_serves_other_sizes_without_recompiling():
    torch._dynamo.reset()
    compiled = torch.compile(region_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for space in ((9, 10), (12, 31), (20, 7)):
            input, target = case(*space, dtype=torch.float32)
            torch.testing.assert_close(compiled(input, target), region_cross_entropy(input, target))


def test_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(region_cross_entropy, fullgraph=True)  # the op alone: nothing for a C++ compiler
    input, target = case(9, 10, dtype=torch.float32)
    eager, traced = input.clone().requires_grad_(), input.clone().requires_grad_()
    region_cross_entropy(eager, target).backward()
    compiled(traced, target).backward()
    torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_input_and_gives_fp32(dtype):
    input, target = case(8, 9, dtype=torch.float32)
    convolution = torch.nn.Conv2d(4, 4, 1)
    with torch.autocast("cpu", dtype):
        logits = convolution(input)
        logits.retain_grad()
        loss = region_cross_entropy(logits, target, weight=torch.ones(4, dtype=dtype))
    assert logits.dtype == dtype and loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == dtype and convolution.weight.grad.isfinite().all()


def upsampled(input, target, **options):
    return region_cross_entropy_upsampled(input, target, align_corners=True, **options)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap calls the op once per sample
@pytest.mark.parametrize("function", [region_cross_entropy, upsampled])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_transforms(function, reduction):
    input, target = case(8, 9, batch=3, dtype=torch.float32)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
    input, target = input[:, None], target[:, None]

    def loss(input, target):
        return function(input, target, weight=weight, reduction=reduction).sum()

    expected = []
    for image, labels in zip(input, target, strict=True):
        leaf = image.clone().requires_grad_()
        expected += torch.autograd.grad(loss(leaf, labels), leaf)
    expected = torch.stack(expected)
    of_one = torch.func.grad(loss)
    torch.testing.assert_close(of_one(input[1], target[1]), expected[1])
    torch.testing.assert_close(torch.func.jacrev(loss)(input[1], target[1]), expected[1])
    torch.testing.assert_close(torch.func.vmap(of_one)(input, target), expected)
    of_all = torch.func.grad(lambda x: torch.func.vmap(loss)(x, target).sum())
    torch.testing.assert_close(of_all(input), expected)


@pytest.mark.parametrize("function", [region_cross_entropy, upsampled])
def test_forward_mode_is_refused(function):
    input, target = case(5, 6)
    op = "region_cross_entropy" + ("_upsampled" if function is upsampled else "")
    message = f"^{op}: forward-mode differentiation is not implemented"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: function(x, target), (input,), (input,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(torch.autograd.forward_ad.make_dual(input, input), target)


def test_second_derivative_is_refused():
    input, target = case(5, 6)
    input.requires_grad_()
    (gradient,) = torch.autograd.grad(region_cross_entropy(input, target), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="region_cross_entropy: a second derivative"):
        gradient.sum().backward()
    twice = torch.func.grad(lambda x: torch.func.grad(region_cross_entropy)(x, target).sum())
    with pytest.raises(NotImplementedError, match="region_cross_entropy: a second derivative"):
        twice(input.detach())


@pytest.mark.parametrize("label", [4, -1, 255, 2**31])
def test_label_out_of_range_names_the_value(label):
    input, target = case(70, 50, void=0)
    target[1, 69, 49] = label
    message = f"region_cross_entropy: expected target to be in 0..3 or an ignored label, got {label}$"
    with pytest.raises(IndexError, match=message):
        region_cross_entropy(input, target)
    with pytest.raises(IndexError, match="got " + str(label)):
        region_cross_entropy(input, target, merge="probs")
    with pytest.raises(IndexError, match=f"region_cross_entropy_upsampled: .* got {label}$"):
        region_cross_entropy_upsampled(input[:, :, ::2, ::2], target)
    region_cross_entropy(input, target, ignore_index=(-100, label))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("merge", ["logits", "probs"])
def test_vectorised_jacobian(merge, dtype):
    input, target = case(4, 5, classes=3, batch=1, dtype=dtype)
    for reduction in ("mean", "none"):

        def loss(x, reduction=reduction):
            return region_cross_entropy(x, target, 3, merge=merge, reduction=reduction) * 2

        one_by_one = torch.autograd.functional.jacobian(loss, input)
        together = torch.autograd.functional.jacobian(loss, input, vectorize=True)
        assert_same_but_for_order(together, one_by_one)
    # Several gradients at once from one graph, which is then used again.
    input.requires_grad_()
    value = region_cross_entropy(input, target, 3, merge=merge)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    several = torch.autograd.grad(value, input, factors, is_grads_batched=True, retain_graph=True)[0]
    one = torch.autograd.grad(value, input, retain_graph=True)[0]
    assert_same_but_for_order(several, factors.view(-1, 1, 1, 1, 1) * one)
    again = torch.autograd.grad(value, input, factors, is_grads_batched=True)[0]
    assert_same_but_for_order(again, several)


ERRORS = {
    "input dtype": (TypeError, "expected input to be float32, .* got Long",
                    {"input": torch.zeros(1, 2, 3, 3).long()}),
    "target dtype": (TypeError, "expected target to be integer, got Float", {"target": torch.zeros(1, 3, 3)}),
    "input type": (TypeError, "expected input to be a tensor, got ndarray",
                   {"input": torch.zeros(1, 2, 3, 3).numpy()}),
    "target type": (TypeError, "expected target to be a tensor, got ndarray",
                    {"target": torch.zeros(1, 3, 3).long().numpy()}),
    "weight type": (TypeError, "expected weight to be a tensor, got list", {"weight": [1.0, 2.0]}),
    "input rank": (ValueError, "expected input to have shape .*got \\[2, 3\\]", {"input": torch.zeros(2, 3)}),
    "target shape": (ValueError, "expected target to have shape .*got \\[1, 3, 4\\]",
                     {"target": torch.zeros(1, 3, 4).long()}),
    "even kernel": (ValueError, "expected kernel_size to be odd and in 1..15, got 4", {"kernel_size": 4}),
    "large kernel": (ValueError, "expected kernel_size to be odd and in 1..15, got 17", {"kernel_size": 17}),
    "kernel axes": (ValueError, "expected kernel_size to have one value per spatial axis",
                    {"kernel_size": (3, 3, 3)}),
    "stride": (ValueError, "expected stride to be at least 1, got 0", {"stride": 0}),
    "spacing": (ValueError, "expected spacing to be positive, got -1", {"spacing": -1.0}),
    "sigma": (ValueError, "expected sigma to be positive, got 0", {"sigma": 0.0}),
    "p": (ValueError, "expected p to be finite and at least 1, got 0.5", {"p": 0.5}),
    "merge": (ValueError, "expected merge to be 'logits' or 'probs', got 'sum'", {"merge": "sum"}),
    "normalize": (ValueError, "expected normalize to be 'weight' or 'count', got 'none'",
                  {"normalize": "none"}),
    "reduction": (ValueError, "expected reduction to be 'mean', 'sum' or 'none', got 'max'",
                  {"reduction": "max"}),
    "sum at p": (ValueError, "expected p to be 1 with reduction 'sum', got 5", {"reduction": "sum"}),
    "smoothing": (ValueError, "expected label_smoothing to be in 0..1, got 2", {"label_smoothing": 2.0}),
    "kernel type": (TypeError, "expected kernel_size to be one or several integers, got 3.7",
                    {"kernel_size": 3.7}),
    "spacing type": (TypeError, "expected spacing to be one or several numbers, got None", {"spacing": None}),
    "ignored type": (TypeError, "expected ignore_index to be one or several integers, got None",
                     {"ignore_index": None}),
    "weight": (ValueError, "expected weight to have shape \\[2\\], got \\[3\\]", {"weight": torch.ones(3)}),
    "ignored": (ValueError, "expected ignore_index to hold at most 16 values, got 17",
                {"ignore_index": list(range(100, 117))}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_expectation_and_value(name):
    kind, message, changed = ERRORS[name]
    arguments = {"input": torch.zeros(1, 2, 3, 3), "target": torch.zeros(1, 3, 3).long()} | changed
    with pytest.raises(kind, match="^region_cross_entropy: " + message):
        region_cross_entropy(**arguments)


def test_peak_extra_memory_is_one_gradient_and_16_bytes_per_pixel():
    input, target = case(64, 80, classes=16, dtype=torch.float32)
    input.requires_grad_()
    pixels = target.numel()
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        loss = region_cross_entropy(input, target)
        loss.backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated <= input.numel() * 4 + 16 * pixels + 4096


def test_offsets_beyond_32_bits():
    # 4 GiB of address space of which a few pages are touched.
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    input = memory.as_strided((2, 2, 3, 3), (2**31, 9, 3, 1)).copy_(torch.randn(2, 2, 3, 3))
    target = torch.randint(2, (2, 3, 3))
    assert torch.equal(region_cross_entropy(input, target), region_cross_entropy(input.contiguous(), target))


def test_memory_of_a_large_gradient_is_kept_for_the_next_one():
    input = torch.randn(1, 4, 512, 512, requires_grad=True)  # 4 MiB
    target = torch.randint(4, (1, 512, 512))

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(region_cross_entropy(input, target), input)[0]

    first = gradient()
    expected, address = first.clone(), first.data_ptr()
    second = gradient()
    assert second.data_ptr() != address  # the first is alive
    assert torch.equal(first, expected) and torch.equal(second, expected)
    del first
    third = gradient()
    assert third.data_ptr() == address
    assert torch.equal(third, expected) and torch.equal(second, expected)


@pytest.mark.parametrize("layout", ["channels_last", "cropped"])
def test_large_gradients_have_the_strides_of_empty_like(layout):
    input = torch.randn(1, 4, 520, 520)[..., :512, :512]
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    input.requires_grad_()
    target = torch.randint(4, (1, 512, 512))
    gradient = torch.autograd.grad(region_cross_entropy(input, target), input)[0]
    assert gradient.stride() == torch.empty_like(input).stride()
    dense = input.detach().contiguous().requires_grad_()
    expected = torch.autograd.grad(region_cross_entropy(dense, target), dense)[0]
    assert_same_but_for_order(gradient, expected)
