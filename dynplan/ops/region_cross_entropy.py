"""Region (adaptive-pooling) cross-entropy: the loss of windows of one category, fused."""

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from dynplan._library import find_op
from dynplan.ops.region_minkowski import mean_over_ranks

_region_cross_entropy = find_op("region_cross_entropy")
_backward = find_op("_region_cross_entropy_backward")
_loss_and_gradient = find_op("_region_cross_entropy_loss_and_gradient")


class RegionStats(NamedTuple):
    """The loss and what the same pass knows beside it.

    Attributes:
        loss: () or (N, *anchors), what ``reduction`` asked for, floating; differentiable.
        normalizer: float64 (), sum over valid anchors of ``weight[label] ** p``; their number without
            ``weight``.
        losses: (N, *anchors) floating, the loss of each anchor, 0 where its label is ignored; differentiable.
        agreement: int16 (N, *anchors), pixels of each window that share the anchor's label, the anchor
            included; 0 where its label is ignored.
    """

    loss: Tensor
    normalizer: Tensor
    losses: Tensor
    agreement: Tensor


def region_cross_entropy(
    input: Tensor,
    target: Tensor,
    kernel_size: int | Sequence[int] = 5,
    sigma: float = 1.0,
    stride: int | Sequence[int] = 1,
    p: float = 5.0,
    merge: str = "logits",
    normalize: str = "weight",
    weight: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    spacing: float | Sequence[float] = 1.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Cross-entropy of windows of one category, in the manner of arXiv 1802.08290.

    Each window centre (anchor) ``q`` merges the logits ``x`` of those pixels of its window ``W(q)`` that
    share its label ``y_q``, and cross-entropy is taken on the merged vector::

        z_q = 1/Z_q * sum over p in W(q), y_p = y_q, of exp(-d(p, q)^2 / 2 sigma^2) x_p
        l_q = logsumexp(z_q) - z_q[y_q]
        L   = (1/M * sum over q of l_q^p)^(1/p)

    with ``d`` the chessboard distance and ``M`` the number of anchors whose label is not ignored.
    Merged logits, one-hot masks and softmax maps are never stored. ``kernel_size=1, p=1`` is
    :func:`torch.nn.functional.cross_entropy`. The paper's equations 4 and 5 give the loss of a window and the
    mean; ``docs/region-loss.md`` lists the choices made where it is silent.

    Args:
        input: (N, C, *spatial) logits with 1 to 3 spatial axes; float32, float64, bfloat16 or float16, any
            strides (channels-last is read in place). Arithmetic is in float32, in float64 for float64,
            autocast or not.
        target: (N, *spatial) or (N, 1, *spatial) labels, in ``0..C-1`` or ignored; uint8, int8, int16, int32
            or int64.
        kernel_size: window size in pixels, odd, 1 to 15; one value or one per axis. Windows are cut at the
            border.
        sigma: of the Gaussian on the chessboard distance, in the unit of ``spacing``; ``math.inf`` weighs all
            pixels of a window alike.
        stride: step between anchors in pixels; anchors sit at ``0, stride, 2 * stride, ...``; one value or
            one per axis.
        p: exponent of the Minkowski mean over anchors, at least 1. Larger values favour hard windows.
        merge: ``"logits"``, or ``"probs"`` to merge probabilities instead:
            ``l_q = -log v_q[y_q]``, ``v_q = sum of exp(-d^2 / 2 sigma^2) softmax(x_p) / Z_q``.
            Probabilities are floored at the smallest normal number, so that no ``-log`` exceeds 87.4 in
            float32; the gradient goes on below the floor.
        normalize: ``Z_q`` is the sum of the agreeing pixels' Gaussian weights (``"weight"``) or their
            number (``"count"``).
        weight: (C,) floating, class weights. A loss is multiplied by its label's weight as in
            ``F.cross_entropy``, and ``M`` becomes the sum of ``weight[y_q]^p``.
        ignore_index: label, or at most 16 labels, whose pixels are in no window and are no anchors.
        label_smoothing: in 0..1, as in ``F.cross_entropy``, on the merged vector: the loss is
            ``1 - label_smoothing`` of the label's and ``label_smoothing / C`` of the weighted sum over
            classes.
        reduction: ``"mean"``, the Minkowski mean; ``"none"``, the map of anchor losses; ``"sum"``, their sum
            (needs ``p=1``).
        spacing: size of a pixel (anisotropic voxels); one value or one per axis.
        process_group: a :mod:`torch.distributed` group: the mean is then over the anchors of all its ranks,
            exactly, and every rank gets that value. Its gradient is multiplied by the number of ranks, since
            ``DistributedDataParallel`` averages gradients. Needs ``reduction="mean"``.

    Returns:
        () loss, or (N, *anchors) with ``reduction="none"``; float32, float64 for float64 input. Where every
        label is ignored the loss and its gradient are 0 (``F.cross_entropy``'s mean is NaN). A second
        derivative is refused, and so are forward-mode ones; :mod:`torch.func`'s ``grad``, ``jacrev`` and
        ``vmap`` are served. On CPU the gradient of float32 ``input`` that requires one is made in the same
        pass and held until ``backward()``; use :func:`torch.no_grad` where none is wanted.

    Raises:
        TypeError: ``input`` is not floating, ``target`` not integer, or an option not a number.
        ValueError: shapes, devices or options that do not fit.
        IndexError: on CPU, a label neither in ``0..C-1`` nor ignored. On CUDA that is a device-side
            assertion, as in PyTorch's own losses.
    """
    return run(
        None, False, process_group, input, target, weight, kernel_size, stride, spacing, sigma, p, merge,
        normalize, ignore_index, label_smoothing, reduction,
    ).loss  # fmt: skip


def region_cross_entropy_stats(
    input: Tensor,
    target: Tensor,
    kernel_size: int | Sequence[int] = 5,
    sigma: float = 1.0,
    stride: int | Sequence[int] = 1,
    p: float = 5.0,
    merge: str = "logits",
    normalize: str = "weight",
    weight: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    spacing: float | Sequence[float] = 1.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    align_corners: bool | None = None,
) -> RegionStats:
    """:func:`region_cross_entropy` with its diagnostics from the same pass.

    Args:
        input, target, kernel_size, sigma, stride, p, merge, normalize: as in :func:`region_cross_entropy`.
        weight, ignore_index, label_smoothing, reduction, spacing: as there.
        process_group: the loss is that of all ranks, the diagnostics are this rank's.
        align_corners: None for logits at the labels' resolution, a bool as in
            :func:`~dynplan.ops.region_cross_entropy_upsampled`.

    Returns:
        The loss, its normaliser, the map of losses and that of agreement.

    Raises:
        TypeError, ValueError, IndexError: as :func:`region_cross_entropy`.
    """
    return run(
        align_corners, True, process_group, input, target, weight, kernel_size, stride, spacing, sigma, p,
        merge, normalize, ignore_index, label_smoothing, reduction,
    )  # fmt: skip


def run(
    align_corners, agreement, process_group, input, target, weight, kernel_size, stride, spacing, sigma, p,
    merge, normalize, ignore_index, label_smoothing, reduction,
) -> RegionStats:  # fmt: skip
    """Calls the op in its schema's terms. ``align_corners``: None where ``input`` has the labels' size."""
    op = _name(align_corners)
    for argument, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (value is None and argument == "weight"):
            raise TypeError(f"{op}: expected {argument} to be a tensor, got {type(value).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}")
    if process_group is not None and reduction != "mean":
        raise ValueError(f"{op}: expected reduction to be 'mean' with process_group, got {reduction!r}")
    axes = max(input.dim() - 2, 0)
    if target.dim() == input.dim() and target.shape[1] == 1:
        target = target.squeeze(1)
    if weight is not None:  # C numbers in the accumulation type, whatever autocast made of them
        weight = weight.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    options = (
        _numbers(op, "kernel_size", kernel_size, axes, index),
        _numbers(op, "stride", stride, axes, index),
        _numbers(op, "spacing", spacing, axes, float),
        float(sigma),
        float(p),
        merge,
        normalize,
        _numbers(op, "ignore_index", ignore_index, 1, index),
        float(label_smoothing),
        "sum" if reduction == "sum" else "mean",
    )
    arguments = (input, target, weight, align_corners, *options, agreement)
    if torch.compiler.is_compiling():  # which traces the op; its autograd is the same function
        outputs = _region_cross_entropy(*arguments)
    else:
        at_once = align_corners is None and not agreement and reduction != "none"
        outputs = _Loss.apply(*arguments, at_once and _gradient_at_once(input, merge, options))
    loss, normalizer, losses, _, counts = outputs[:5]
    if reduction == "none":
        loss = losses
    elif process_group is not None:
        loss = mean_over_ranks(loss, normalizer, p, process_group)
    return RegionStats(loss, normalizer, losses, counts)


def _numbers(op: str, argument: str, value, count: int, number: Callable) -> list:
    """The numbers of ``value``; ``count`` times ``value`` where it is one number."""
    try:
        if type(value) is int or type(value) is float:  # nearly always, and the others take longer to tell
            return [number(value)] * count
        if isinstance(value, Iterable) and not (isinstance(value, Tensor) and value.dim() == 0):
            return [number(v) for v in value]
        return [number(value)] * count
    except TypeError:
        kind = "numbers" if number is float else "integers"
        raise TypeError(f"{op}: expected {argument} to be one or several {kind}, got {value!r}") from None


def _name(align_corners: bool | None) -> str:
    """The public function that an error is to name."""
    return "region_cross_entropy" if align_corners is None else "region_cross_entropy_upsampled"


class _Loss(Function):
    """The op and its autograd. Arguments are the schema's and ``at_once``: whether the gradient of the value
    is made in the same pass, as a sixth output. The form with a ``setup_context`` serves torch.func as well.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, target, weight, align_corners, *rest):
        *options, agreement, at_once = rest
        with torch._C._AutoDispatchBelowAutograd():
            if not at_once:
                return _region_cross_entropy(input, target, weight, align_corners, *options, agreement)
            *state, gradient = _loss_and_gradient(input, target, weight, *options)
        return *state, input.new_empty(0, dtype=torch.int16), gradient

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        value, normalizer, losses, lse, agreement, *gradient = output
        ctx.save_for_backward(*inputs[:3], value, normalizer, losses, lse)
        ctx.gradient = gradient[0] if gradient else None
        ctx.options = inputs[3:-2]
        ctx.mark_non_differentiable(normalizer, lse, agreement, *gradient)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, _normalizer, grad_losses, *_):
        inputs, state = ctx.saved_tensors[:3], ctx.saved_tensors[3:]  # here changed logits are noticed
        align_corners, *options = ctx.options
        kept, grad = ctx.gradient, None
        usable = kept is not None and grad_losses is None and not torch.is_grad_enabled()
        if grad_value is None and grad_losses is None:
            pass
        elif usable and _is_batched(grad_value):
            grad = grad_value * kept  # several at once, each with a gradient of its own
        elif usable:
            # Handed out once; who receives it may write to it.
            ctx.gradient, grad = None, kept if grad_value.item() == 1 else kept.mul_(grad_value)
        else:
            ctx.gradient = None
            grad = _Gradient.apply(grad_value, grad_losses, *inputs, align_corners, *state, *options)
        return grad, *[None] * (len(ctx.options) + 4)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(f"{_name(ctx.options[0])}: forward-mode differentiation is not implemented")


class _Gradient(Function):
    """The backward op, whose own derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name = _name(inputs[5])

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(f"{ctx.name}: a second derivative is not implemented")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(f"{ctx.name}: forward-mode differentiation is not implemented")


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _gradient_at_once(input: Tensor, merge: str, options: tuple) -> bool:
    """Whether the gradient will be wanted and costs least when it is made with the loss: on CPU in float32.
    (A gradient in 16 bits would be rounded twice.)
    """
    _, stride, *_, label_smoothing, _ = options
    return (
        input.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and input.device.type == "cpu"
        and input.dtype == torch.float32
        and merge == "logits"
        and label_smoothing == 0
        and stride.count(1) == len(stride)
    )


@torch.library.register_fake("dynplan::region_cross_entropy")
def _fake(input: Tensor, target: Tensor, weight: Tensor | None, align_corners, *rest):
    state = _fake_state(_name(align_corners), input, target, *rest[:2], merge=rest[5])
    return *state, input.new_empty(state[2].shape if rest[-1] else (0,), dtype=torch.int16)


@torch.library.register_fake("dynplan::_region_cross_entropy_loss_and_gradient")
def _fake_loss_and_gradient(input: Tensor, target: Tensor, weight: Tensor | None, *options):
    state = _fake_state(_name(None), input, target, *options[:2], merge=options[5])
    return *state, torch.empty_like(input)


@torch.library.register_fake("dynplan::_region_cross_entropy_backward")
def _fake_backward(grad_value: Tensor | None, grad_losses: Tensor | None, input: Tensor, *_):
    return torch.empty_like(input)


def _fake_state(op: str, input: Tensor, target: Tensor, kernel_size, stride, *, merge: str):
    _check_shapes(op, input, target, len(kernel_size), len(stride))
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    space = target.shape[1:]
    anchors = (target.shape[0], *((n + s - 1) // s for n, s in zip(space, stride, strict=True)))
    return (
        input.new_empty((), dtype=acc),
        input.new_empty((), dtype=torch.float64),
        input.new_empty(anchors, dtype=acc),
        input.new_empty(target.shape if merge == "probs" else anchors, dtype=acc),
    )


def _check_shapes(op: str, input: Tensor, target: Tensor, *lengths: int) -> None:
    """The checks of csrc/ops/region_cross_entropy.cpp that tracing needs, in its words."""
    torch._check_type(
        input.dtype.is_floating_point,
        lambda: f"{op}: expected input to be float32, float64, bfloat16 or float16, got {input.dtype}",
    )
    torch._check_type(
        not target.dtype.is_floating_point, lambda: f"{op}: expected target to be integer, got {target.dtype}"
    )
    axes = input.dim() - 2
    torch._check_value(
        target.dim() == axes + 1 and all(length == axes for length in lengths),
        lambda: (
            f"{op}: expected target to have shape (N, *spatial) for input {list(input.shape)}, "
            f"got {list(target.shape)}"
        ),
    )


# The autograd of the ops themselves. (torch.library.register_autograd refuses torch.func's transforms.)
_autograd = torch.library.Library("dynplan", "IMPL")
_autograd.impl("region_cross_entropy", lambda *arguments: _Loss.apply(*arguments, False), "Autograd")
_autograd.impl("_region_cross_entropy_backward", _Gradient.apply, "Autograd")
