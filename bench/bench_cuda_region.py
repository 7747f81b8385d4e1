"""The region loss on a GPU beside plain cross-entropy: time of forward and backward, share of the byte floor.

    python bench/bench_cuda_region.py
    python bench/bench_cuda_region.py --map labels.png    a real label map (grey or palette) too

The floor is three logit-sizes, labels twice and 16 bytes a pixel at the bandwidth that a device-to-device
copy of the same run reaches. ``scene`` labels are objects of some 60 pixels, ``noise`` labels change at every
pixel. Results are checked against fp64 before they are timed; every form is a CUDA graph. Last come the bars:
what is hoped of an H200, met or not. ``bench_region_cross_entropy.py --device cuda`` has the other rivals.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from bars import Bar, report
from bench_region_cross_entropy import SHAPES, labels
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynplan.benchmarking import Timing, append_history, environment, interleave, recorded
from dynplan.ops import region_cross_entropy
from dynplan.reference import region_cross_entropy as reference

DEVICE = torch.device("cuda")
BARRED = ("cityscapes", "region 5")  # the shape and form that the bars are for
MICROSECONDS = {"float32": 325, "bfloat16": 280}
COPY_BYTES = 2 << 30


def label_map(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The picture's values as labels of the shape: the nearest pixel's, numbered in ascending order."""
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode not in ("L", "P"):
            sys.exit(f"--map: expected grey values or a palette, got mode {picture.mode} in {path}")
        batch, classes, height, width = shape
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width)
    _, found = values.unique(return_inverse=True)
    return (found % classes).expand(batch, -1, -1).contiguous().to(DEVICE)


def both_ways(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], None]:
    """Forward and backward as one CUDA graph: device time without Python's."""
    leaf = logits.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return recorded(step)


def check(kernel_size: int) -> None:
    """The result before its time: value and gradient against the reference in fp64."""
    shape = (2, 5, 70, 90)
    logits, target = torch.randn(shape, device=DEVICE), labels("scene", shape, DEVICE)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = region_cross_entropy(ours, target, kernel_size=kernel_size)
    wanted = reference.region_cross_entropy(exact, target, kernel_size=kernel_size)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=20)["copy"]
    return 2 * source.nbytes / timing.p50


def measure(shape: tuple[int, ...], dtype: torch.dtype, target: Tensor, rounds: int) -> dict[str, Timing]:
    """Cross-entropy and the region loss for windows of 3, 5 and 7."""
    logits = torch.randn(shape, device=DEVICE, dtype=dtype)
    forms = {"cross-entropy": both_ways(lambda x: F.cross_entropy(x, target), logits)}
    for k in (3, 5, 7):
        loss = lambda x, k=k: region_cross_entropy(x, target, kernel_size=k)  # noqa: E731
        forms[f"region {k}"] = both_ways(loss, logits)
    return interleave(forms, rounds, warmup=3)


def bars_of(measured: dict[tuple[str, str, str], dict[str, Timing]]) -> list[Bar]:
    """What this run says of each hope; ``measured``: by shape, type and kind of labels, noise left out."""
    shape, form = BARRED
    bars = []
    for dtype, bound in MICROSECONDS.items():
        runs = [
            t for (name, of, kind), t in measured.items() if (name, of) == (shape, dtype) and kind != "noise"
        ]
        times = [1e6 * t[form].p50 for t in runs]
        shares = [t[form].p50 / t["cross-entropy"].p50 for t in runs]
        bars.append(Bar(f"{shape}, {form}, {dtype}, in us", max(times, default=None), bound))
        bars.append(Bar(f"{shape}, {form}, {dtype}, of cross-entropy", max(shares, default=None), 0.5))
    return bars


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flat = [name for name, shape in SHAPES.items() if len(shape) == 4]
    parser.add_argument("--shapes", nargs="+", choices=flat, default=["voc", "cityscapes", "ade"])
    parser.add_argument("--map", type=Path, help="picture of a real scene's labels, timed beside the others")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--history", type=Path, default=Path(__file__).with_name("history") / "cuda.jsonl")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_cuda_region: expected a CUDA device and a CUDA build of torch, found none")
    torch.manual_seed(0)
    for kernel_size in (3, 5, 7):
        check(kernel_size)
    bandwidth = copy_bandwidth()
    table = Table("shape", "dtype", "labels", "form", "us", "of cross-entropy", "of byte floor")
    measured = {}
    for name in options.shapes:
        shape = SHAPES[name]
        targets = {kind: labels(kind, shape, DEVICE) for kind in ("scene", "noise")}
        if options.map is not None:
            targets["map"] = label_map(options.map, shape)
        for dtype in (torch.float32, torch.bfloat16):
            of = str(dtype).removeprefix("torch.")
            for kind, target in targets.items():
                timings = measured[name, of, kind] = measure(shape, dtype, target, options.rounds)
                size = torch.Size(shape).numel() * dtype.itemsize
                floor = (3 * size + 2 * target.nbytes + 16 * target.numel()) / bandwidth
                here = {"op": "region_cross_entropy", "shape": f"{name} {kind}", "baseline": "cross-entropy"}
                here |= {"dtype": of, "floor": floor} | environment(DEVICE.type)
                append_history(
                    options.history, [here | {"impl": form} | t._asdict() for form, t in timings.items()]
                )
                rival = timings["cross-entropy"].p50
                for form, timing in timings.items():
                    ratios = (timing.p50 * 1e6, timing.p50 / rival, floor / timing.p50)
                    table.add_row(name, of, kind, form, *map("{:.{}f}".format, ratios, (0, 2, 2)))
    Console().print(table)
    report("cuda_region_bar", bars_of(measured), options.history, DEVICE.type)


if __name__ == "__main__":
    main()
