"""Valid calls of every op and of every function of ``dynplan._native``, at random and small.

A call is a list of positional arguments. ``CALLS`` names the function, as an error names it, and how to draw
them.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from dynplan import _C, _native
from dynplan.ops import build_dispatch

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
ACTIVATIONS = ["gelu", "gelu_new", "relu", "silu"]
ops = torch.ops.dynplan


class Draw(random.Random):
    """Random arguments."""

    def size(self, least: int, most: int) -> int:
        """Small numbers more often."""
        return self.randint(least, self.randint(least, most))

    def strided(self, tensor: Tensor) -> Tensor:
        """The same values, in some order in memory, with gaps for some."""
        order = list(range(tensor.dim()))
        self.shuffle(order)
        if self.random() < 0.5:
            tensor = tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
        if self.random() < 0.2 and tensor.dim():
            wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 2))
            wide[..., : tensor.shape[-1]] = tensor
            tensor = wide[..., : tensor.shape[-1]]
        return tensor

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape).to(dtype)

    def integers(self, least: int, most: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(least, most + 1, shape).to(dtype)

    def mask(self, *shape: int) -> Tensor:
        mask = self.integers(0, 1, *shape, dtype=self.choice([torch.bool, *INTEGERS]))
        return mask

    def offsets(self, samples: int, most: int = 7) -> Tensor:
        lengths = [self.size(0, most) for _ in range(samples)]
        return torch.tensor([0, *lengths]).cumsum(0).int()


def draw_pack(d: Draw) -> list:
    batch, length, width = d.size(0, 5), d.size(0, 9), d.size(0, 9)
    dtype = d.choice([*FLOATS, *INTEGERS, torch.bool, torch.complex64])
    return [d.strided(d.floats(batch, length, width).to(dtype)), d.strided(d.mask(batch, length))]


def draw_unpack(d: Draw) -> list:
    batch, length, width = d.size(0, 5), d.size(0, 9), d.size(0, 9)
    places = d.sample(range(batch * length), d.size(0, batch * length))
    indices = torch.tensor([-1 if d.random() < 0.2 else p for p in places], dtype=torch.int32)
    return [d.strided(d.floats(len(places), width, dtype=d.choice(FLOATS))), indices, batch, length]


def draw_unpack_backward(d: Draw) -> list:
    packed, indices, batch, length = draw_unpack(d)
    return [d.strided(d.floats(batch, length, packed.shape[1], dtype=packed.dtype)), indices]


def draw_build_dispatch(d: Draw) -> list:
    samples = d.size(0, 6)
    keep = d.integers(0, 1, samples, *[d.size(0, 5)] * d.randint(0, 1)).bool()
    offsets = d.offsets(samples)
    return [d.strided(keep), offsets, int(offsets[-1]) + d.size(0, 3)]


def layer_weights(d: Draw, width: int, inner: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    shapes += [(inner, width), (inner,), (width, inner), (width,), (width,), (width,)]
    return [d.strided(d.floats(*shape, dtype=dtype)) for shape in shapes]


def draw_pack_encoder_weights(d: Draw) -> list:
    dtype = d.choice([torch.float32, torch.bfloat16])
    return [layer_weights(d, d.size(1, 9), d.size(1, 12), dtype)]


def draw_pack_reduced(d: Draw) -> list:
    dtype = d.choice([torch.float32, torch.bfloat16])
    return [layer_weights(d, d.size(2, 9), d.size(2, 12), dtype), d.choice(["int8", "bfloat16"])]


def blobs(d: Draw, width: int, layers: int) -> list[Tensor]:
    inner, kind = d.size(2, 12), d.choice(["float32", "int8", "bfloat16"]) if width > 1 else "float32"
    packed = []
    for _ in range(layers):
        weights = layer_weights(d, width, inner)
        packed.append(
            ops.pack_encoder_weights(weights)
            if kind == "float32"
            else ops.pack_reduced_encoder_weights(weights, kind)
        )
    return packed


def draw_conditional_encoder(d: Draw, one: bool = False) -> list:
    heads = d.size(1, 3)
    width, layers, samples = heads * d.size(1, 6), 1 if one else d.size(0, 3), d.size(0, 4)
    offsets = d.offsets(samples)
    tokens = int(offsets[-1]) + d.size(0, 2)
    dispatch = build_dispatch(d.integers(0, 1, samples, layers).bool(), offsets, tokens)
    hidden = d.strided(d.floats(tokens, width, dtype=d.choice([torch.float32, torch.bfloat16])))
    packed = blobs(d, width, layers)
    tensors = [t[0] for t in dispatch] if one else list(dispatch)
    return [
        hidden, *tensors, packed[0] if one else packed, heads, d.choice(ACTIVATIONS), d.choice([1e-12, 1e-5])
    ]  # fmt: skip


def draw_embed_tokens(d: Draw, width: int | None = None, batch: int | None = None) -> list:
    batch, length = d.size(0, 4) if batch is None else batch, d.size(0, 8)
    width, words, types = width or d.size(1, 9), d.size(1, 9), d.size(1, 3)
    padding_idx = d.choice([None, 0, 1])
    positions = length + (padding_idx or 0) + 1
    integer = d.choice([torch.int32, torch.int64])
    return [
        d.strided(d.integers(0, words - 1, batch, length, dtype=integer)),
        None if d.random() < 0.2 else d.strided(d.mask(batch, length)),
        None if d.random() < 0.2 else d.integers(0, types - 1, batch, length, dtype=integer),
        *(d.strided(d.floats(rows, width)) for rows in (words, types, positions)),
        d.floats(width), d.floats(width), 1e-5, padding_idx,
    ]  # fmt: skip


def draw_encode_tokens(d: Draw) -> list:
    heads = d.size(1, 3)
    width, layers = heads * d.size(1, 6), d.size(0, 3)
    embed = draw_embed_tokens(d, width)
    keep = None if d.random() < 0.3 else d.strided(d.integers(0, 1, len(embed[0]), layers).bool())
    return [*embed, keep, blobs(d, width, layers), heads, d.choice(ACTIVATIONS), 1e-5, False]


def linear(d: Draw, inputs: int, outputs: int) -> list[Tensor]:
    return [d.floats(outputs, inputs), d.floats(outputs)]


def draw_encode_until_sure(d: Draw) -> list:
    heads = d.size(1, 3)
    width, layers, classes = heads * d.size(1, 6), d.size(1, 4), d.size(1, 4)
    chain = sorted(d.sample(range(1, layers + 1), d.size(0, layers)))
    rungs = sum(depth < layers for depth in chain)
    sureness = d.choice(["confidence", "entropy", "learned", "error", "patience"])
    measures = []
    for _ in range(rungs):
        if sureness == "learned":
            measures += linear(d, width, 1)
        elif sureness == "error":
            inside = d.size(1, 5)
            measures += [*linear(d, width + 1, inside), *linear(d, inside, 1)]
    head = linear(d, width, classes)
    if d.random() < 0.5:
        inside = d.size(1, 5)
        head = [*linear(d, width, inside), *linear(d, inside, classes)]
    return [
        *draw_embed_tokens(d, width), blobs(d, width, layers), heads, d.choice(ACTIVATIONS), 1e-5, False,
        chain, [t for _ in range(rungs) for t in linear(d, width, width)], head,
        d.choice(["none", "tanh", "gelu", "relu"]), sureness, measures, [1.5] * rungs,
        [d.random() for _ in range(d.size(1, 4))], d.choice([0.0, 0.3, 1.0]),
        None if d.random() < 0.5 else torch.zeros(5, dtype=torch.int64), d.choice([0.0, 4.0]), 0.5,
    ]  # fmt: skip


def region_options(d: Draw, axes: int) -> list:
    p = d.choice([1.0, 2.0, 5.0])
    ignored = [d.choice([-100, 255, 0]) for _ in range(d.size(0, 3))]
    return [
        [d.choice([1, 3, 5, 15]) for _ in range(axes)], [d.size(1, 3) for _ in range(axes)],
        [d.choice([0.5, 1.0]) for _ in range(axes)], d.choice([0.5, 1.0, 100.0]), p,
        d.choice(["logits", "probs"]), d.choice(["weight", "count"]), ignored, d.choice([0.0, 0.0, 0.1, 1.0]),
        "sum" if p == 1 and d.random() < 0.5 else "mean",
    ]  # fmt: skip


def region_inputs(d: Draw, upsampled: bool, dtypes: list = FLOATS) -> tuple[list, int]:
    axes = 2 if upsampled else d.randint(1, 3)
    batch, classes = d.size(0, 3), d.size(1, 5)
    space = [d.size(0, 7 if axes == 3 else 20) for _ in range(axes)]
    low = [d.size(1, 6), d.size(1, 6)] if upsampled else space
    dtype = d.choice(dtypes)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    target = d.integers(0, classes - 1, batch, *space, dtype=d.choice(INTEGERS))
    weight = None if d.random() < 0.5 else torch.rand(classes, dtype=acc)
    return [d.strided(d.floats(batch, classes, *low, dtype=dtype)), d.strided(target), weight], axes


def draw_region(d: Draw) -> list:
    align_corners = d.choice([None, None, True, False])
    inputs, axes = region_inputs(d, align_corners is not None)
    return [*inputs, align_corners, *region_options(d, axes), d.random() < 0.5]


def draw_region_backward(d: Draw) -> list:
    input, target, weight, align_corners, *options, _ = draw_region(d)
    value, normalizer, losses, lse, _ = ops.region_cross_entropy(
        input, target, weight, align_corners, *options, False
    )
    grad_value = None if d.random() < 0.2 else torch.ones_like(value)
    grad_losses = None if d.random() < 0.5 else d.strided(torch.rand_like(losses))
    state = (value, normalizer, losses, lse)
    return [grad_value, grad_losses, input, target, weight, align_corners, *state, *options]


def draw_region_at_once(d: Draw) -> list:
    inputs, axes = region_inputs(d, False, [torch.float32, torch.float64])
    return [*inputs, *region_options(d, axes)]


def stream_counts(d: Draw) -> Tensor:
    return torch.tensor([d.size(0, 9) for _ in range(5)])


def draw_stream_take(d: Draw) -> list:
    samples, layers = d.size(0, 6), d.size(0, 12)
    return [
        stream_counts(d), d.strided(d.floats(samples)), d.strided(d.integers(0, 1, samples).bool()),
        d.offsets(samples), d.size(0, layers), layers, d.random(), float(d.size(0, 4)),
    ]  # fmt: skip


def draw_weight_watch(d: Draw) -> list:
    shapes = [[d.size(0, 9) for _ in range(d.size(0, 3))] for _ in range(d.size(0, 4))]
    return [[d.strided(d.floats(*shape).to(d.choice([*FLOATS, *INTEGERS]))) for shape in shapes]]


def watch(tensors: list[Tensor]) -> bool:
    """A WeightWatch of tensors that nothing has touched."""
    watching = torch.classes.dynplan.WeightWatch(tensors)
    return _C.weights_are_unchanged(watching.handle())


def arrays(arguments: list) -> list:
    return [a.contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments]


def native_encoder(d: Draw) -> list:
    hidden, *rest = draw_conditional_encoder(d)
    rows, offsets, counts, packed, heads, activation, eps = rest
    tensors = arrays([hidden.float(), rows, offsets, counts])
    return [*tensors, arrays(packed), heads, activation, eps, d.choice(["", "baseline"])]


def native_embed(d: Draw) -> list:
    ids, mask, types, *tables, eps, padding_idx = draw_embed_tokens(d)
    mask = torch.ones_like(ids) if mask is None else mask
    types = torch.zeros_like(ids) if types is None else types
    return [
        *arrays([ids.long(), mask.bool(), types.long(), *tables]),
        eps,
        -1 if padding_idx is None else padding_idx,
    ]


def native_region(d: Draw) -> list:
    shape = [d.size(0, 2), d.size(1, 5), d.size(0, 20), d.size(0, 20)]
    target = d.integers(0, shape[1] - 1, shape[0], *shape[2:])
    return [*arrays([d.floats(*shape), target]), d.choice([1, 3, 5, 15]), d.choice([0.5, 1.0]), 5.0, -100]


def native_pack(d: Draw) -> list:
    shape = [d.size(0, 4), d.size(0, 8), d.size(0, 8)]
    return arrays([d.floats(*shape), d.integers(0, 1, *shape[:2]).bool()])


def native_dispatch(d: Draw) -> list:
    samples = d.size(0, 5)
    return arrays([d.integers(0, 1, samples, d.size(0, 4)).bool(), d.offsets(samples)])


def native_weights(d: Draw) -> list:
    dtype = d.choice(["float32", "bfloat16", "int8"])
    return [arrays(layer_weights(d, d.size(2, 9), d.size(2, 12))), dtype]


def nothing(d: Draw) -> list:
    return []


CALLS: dict[str, tuple[Callable, Callable[[Draw], list]]] = {
    "pack": (ops.pack, draw_pack),
    "unpack": (ops.unpack, draw_unpack),
    "_unpack_backward": (ops._unpack_backward, draw_unpack_backward),
    "build_dispatch": (ops.build_dispatch, draw_build_dispatch),
    "pack_encoder_weights": (ops.pack_encoder_weights, draw_pack_encoder_weights),
    "pack_reduced_encoder_weights": (ops.pack_reduced_encoder_weights, draw_pack_reduced),
    "conditional_encoder": (ops.conditional_encoder, draw_conditional_encoder),
    "conditional_encoder_layer": (
        ops.conditional_encoder_layer,
        lambda d: draw_conditional_encoder(d, one=True),
    ),
    "embed_tokens": (ops.embed_tokens, draw_embed_tokens),
    "encode_tokens": (ops.encode_tokens, draw_encode_tokens),
    "encode_until_sure": (ops.encode_until_sure, draw_encode_until_sure),
    "region_cross_entropy": (ops.region_cross_entropy, draw_region),
    "_region_cross_entropy_backward": (ops._region_cross_entropy_backward, draw_region_backward),
    "_region_cross_entropy_loss_and_gradient": (
        ops._region_cross_entropy_loss_and_gradient,
        draw_region_at_once,
    ),
    "_stream_arrive": (ops._stream_arrive, lambda d: [stream_counts(d), d.offsets(d.size(0, 5))]),
    "_stream_take": (ops._stream_take, draw_stream_take),
    "_stream_add": (ops._stream_add, lambda d: [stream_counts(d), [d.size(0, 9) for _ in range(5)]]),
    "_stream_read": (ops._stream_read, lambda d: [stream_counts(d)]),
    "_stream_write": (ops._stream_write, lambda d: [stream_counts(d), [d.size(0, 9) for _ in range(5)]]),
    "_encoder_phases": (ops._encoder_phases, lambda d: [d.random() < 0.5]),
    "_int8_weight_levels": (ops._int8_weight_levels, nothing),
    "_multiplies_bfloat16": (ops._multiplies_bfloat16, nothing),
    "_build_info": (ops._build_info, nothing),
    "WeightWatch": (watch, draw_weight_watch),
    "_native.pack": (_native.pack, native_pack),
    "_native.build_dispatch": (_native.build_dispatch, native_dispatch),
    "_native.embed_tokens": (_native.embed_tokens, native_embed),
    "_native.pack_encoder_weights": (_native.pack_encoder_weights, native_weights),
    "_native.conditional_encoder": (_native.conditional_encoder, native_encoder),
    "_native.region_cross_entropy": (_native.region_cross_entropy, native_region),
    "_native.cpu_features": (_native.cpu_features, nothing),
    "_native.build_info": (_native.build_info, nothing),
}
