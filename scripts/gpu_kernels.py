"""Runs every CUDA kernel of dynplan once or more at small sizes, for compute-sanitizer (see gpu_run.sh)."""

import itertools
from typing import NamedTuple

import torch

from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    pack,
    pack_encoder_weights,
    region_cross_entropy,
    unpack,
)
from dynplan.ops.region_cross_entropy_upsampled import region_cross_entropy_upsampled

DEVICE = "cuda"
ENCODER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Encoder(NamedTuple):
    """Sizes of one run: together they take every tile of the products on a chip of 132 multiprocessors, every
    head dimension of the attention and every width of the norm that has a kernel of its own."""

    samples: int
    length: int
    width: int
    heads: int
    intermediate: int


SMALL = (Encoder(4, 37, 64, 4, 128), Encoder(2, 9, 640, 10, 64), Encoder(2, 9, 1032, 43, 64))
LARGE = (Encoder(64, 64, 256, 4, 512), Encoder(25, 60, 256, 2, 512))


def encoder(dtype: torch.dtype, sizes: Encoder) -> None:
    samples, length, width, heads, inner = sizes
    hidden = torch.randn(samples, length, width, device=DEVICE, dtype=dtype)
    tokens = torch.full((samples, 1), length, device=DEVICE)
    tokens[1] = 0 if samples == 4 else length
    packed = pack(hidden, torch.arange(length, device=DEVICE) < tokens)
    keep = torch.ones(samples, 2, dtype=torch.bool, device=DEVICE)
    keep[0, 1] = False
    dispatch = build_dispatch(keep, packed.cu_seqlens, len(packed.hidden))
    attention = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    shapes = [*attention, (inner, width), (inner,), (width, inner), (width,), (width,), (width,)]
    weights = EncoderLayerWeights(
        *(torch.randn(s, device=DEVICE, dtype=dtype) / s[-1] ** 0.5 for s in shapes)
    )
    blobs = [pack_encoder_weights(weights)] * 2
    with torch.no_grad():
        out = conditional_encoder(packed.hidden, dispatch, None, heads, packed_weights=blobs)
    unpack(out, packed.indices, samples, length)


def region(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout=torch.contiguous_format, **options
):
    logits = torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=layout).requires_grad_()
    coarse = torch.randint(shape[1], (shape[0], *((n + 15) // 16 for n in shape[2:])), device=DEVICE)
    target = coarse
    for axis, size in enumerate(shape[2:], start=1):
        target = target.repeat_interleave(16, axis).narrow(axis, 0, size)
    region_cross_entropy(logits, target.clone(), **options).backward()


def main() -> None:
    for dtype in ENCODER_DTYPES:
        for sizes in SMALL if dtype == torch.float16 else SMALL + LARGE:
            encoder(dtype, sizes)
        for size, width in itertools.product((3, 5, 7), (70, 71)):
            region((1, 3, 37, width), dtype, kernel_size=size)
    region((1, 3, 33, 40), kernel_size=5, label_smoothing=0.1)
    region((1, 3, 18, 20), torch.float64, kernel_size=3)
    region((2, 3, 18, 20), kernel_size=5, layout=torch.channels_last)
    region((1, 3, 6, 9, 10), kernel_size=3, stride=2)
    region((1, 3, 18, 20), kernel_size=5, merge="probs")
    for align_corners in (False, True):
        low = torch.randn(1, 3, 5, 6, device=DEVICE, requires_grad=True)
        target = torch.randint(3, (1, 20, 24), device=DEVICE)
        region_cross_entropy_upsampled(low, target, align_corners=align_corners).backward()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
