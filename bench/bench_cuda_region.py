"""The region loss on a GPU beside plain cross-entropy: time of forward and backward, share of the byte floor.

    python bench/bench_cuda_region.py

The floor is three logit-sizes, labels twice and 16 bytes a pixel at the bandwidth that a device-to-device
copy of the same run reaches. ``scene`` labels lie in blocks of 64 pixels, ``noise`` labels change at every
pixel.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynplan.benchmarking import append_history, environment, interleave, recorded
from dynplan.ops import region_cross_entropy
from dynplan.reference import region_cross_entropy as reference

SHAPES = {
    "voc": (10, 21, 321, 321),
    "cityscapes": (8, 19, 512, 1024),
    "ade": (4, 150, 512, 512),
}


def labels_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    batch, classes, height, width = shape
    block = 64 if kind == "scene" else 1
    coarse = torch.randint(classes, (batch, -(-height // block), -(-width // block)), device="cuda")
    return coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width].contiguous()


def both_ways(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], None]:
    """Forward and backward as one CUDA graph: device time without Python's."""
    leaf = logits.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return recorded(step)


def check(kernel_size: int) -> None:
    """The result before its time: value and gradient against the reference in fp64."""
    logits, target = torch.randn(2, 5, 70, 90, device="cuda"), labels_of("scene", (2, 5, 70, 90))
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = region_cross_entropy(ours, target, kernel_size=kernel_size)
    wanted = reference.region_cross_entropy(exact, target, kernel_size=kernel_size)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def copy_bandwidth() -> float:
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=20)["copy"]
    return 2 * source.nbytes / timing.p50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--history", type=Path, default=Path(__file__).with_name("history") / "cuda.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_region: expected a CUDA device and a CUDA build of torch, found none")
    for kernel_size in (3, 5, 7):
        check(kernel_size)
    bandwidth = copy_bandwidth()
    table = Table("shape", "dtype", "labels", "form", "us", "of cross-entropy", "of byte floor")
    for name in options.shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("scene", "noise"):
                shape = SHAPES[name]
                logits, target = torch.randn(shape, device="cuda", dtype=dtype), labels_of(kind, shape)
                forms = {"cross-entropy": both_ways(lambda x, t=target: F.cross_entropy(x, t), logits)}
                for k in (3, 5, 7):
                    loss = lambda x, t=target, k=k: region_cross_entropy(x, t, kernel_size=k)  # noqa: E731
                    forms[f"region {k}"] = both_ways(loss, logits)
                timings = interleave(forms, options.rounds, warmup=3)
                pixels = target.numel()
                floor = (3 * logits.nbytes + 2 * target.nbytes + 16 * pixels) / bandwidth
                here = {"op": "region_cross_entropy", "shape": f"{name} {kind}", "baseline": "cross-entropy"}
                here |= {"dtype": str(dtype).removeprefix("torch."), "floor": floor} | environment("cuda")
                append_history(
                    options.history, [here | {"impl": f} | t._asdict() for f, t in timings.items()]
                )
                rival = timings["cross-entropy"].p50
                for form, timing in timings.items():
                    times = (
                        f"{timing.p50 * 1e6:.0f}",
                        f"{timing.p50 / rival:.2f}",
                        f"{floor / timing.p50:.2f}",
                    )
                    table.add_row(name, here["dtype"], kind, form, *times)
    Console().print(table)


if __name__ == "__main__":
    main()
