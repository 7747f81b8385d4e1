"""Runs every CUDA kernel of dynplan once or more at small sizes, for compute-sanitizer (see gpu_run.sh)."""

import itertools

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


def encoder(dtype: torch.dtype) -> None:
    hidden = torch.randn(4, 37, 64, device=DEVICE, dtype=dtype)
    mask = torch.arange(37, device=DEVICE) < torch.tensor([[37], [0], [5], [21]], device=DEVICE)
    packed = pack(hidden, mask)
    dispatch = build_dispatch(torch.rand(4, 2, device=DEVICE) < 0.6, packed.cu_seqlens, len(packed.hidden))
    attention = [(192, 64), (192,), (64, 64), (64,), (64,), (64,)]
    shapes = [*attention, (128, 64), (128,), (64, 128), (64,), (64,), (64,)]
    weights = EncoderLayerWeights(*(0.1 * torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes))
    blobs = [pack_encoder_weights(weights)] * 2
    with torch.no_grad():
        out = conditional_encoder(packed.hidden, dispatch, None, 4, packed_weights=blobs)
    unpack(out, packed.indices, 4, 37)


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
        encoder(dtype)
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
