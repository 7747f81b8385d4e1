"""region_cross_entropy, forward and backward, beside what a user would otherwise run, in one interleaved run.

    python bench/bench_region_cross_entropy.py                  # the shape that the CPU bars are for
    python bench/bench_region_cross_entropy.py --fast           # the same without the slow rivals
    python bench/bench_region_cross_entropy.py --fast --method small general   # each CPU loop
    python bench/bench_region_cross_entropy.py --device cuda --dtype bfloat16 --shape cityscapes --kernel 5

Rivals: ``F.cross_entropy`` (no windows at all), the eager shift-and-add form (the reference), ``F.unfold``,
and the shift-and-add form under torch.compile. Results are checked against fp64 before they are timed. Each
timed call follows one of the same loss that is not timed, and that begins without what other losses freed.
Floor: three logit-sized transfers (read, read, write), labels twice, 16 bytes a pixel. ``B/pixel`` is what is
allocated at once beyond a gradient, per pixel; ours is to stay at 16.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynplan.benchmarking import append_history, environment, interleave
from dynplan.ops import region_cross_entropy
from dynplan.reference import region_cross_entropy as reference

SHAPES = {
    "tiny": (2, 21, 65, 65),
    "voc-2": (2, 21, 321, 321),
    "camvid": (4, 12, 180, 240),
    "volume-small": (1, 8, 32, 64, 64),
    "voc": (10, 21, 321, 321),
    "cityscapes": (8, 19, 512, 1024),
    "ade": (16, 150, 512, 512),
    "volume": (2, 32, 128, 128, 128),
}
DEFAULTS = {"merge": "logits", "label_smoothing": 0.0}
LARGEST_UNFOLD = 4 << 30  # bytes of its buffer
# Most of cross_entropy's time that a kernel size may take: fp32, two threads, voc-2, labels smooth or scene.
BARS = {"dynplan 3": 0.60, "dynplan 5": 0.80, "dynplan 7": 1.00}
METHODS = ("small", "general")


def labels(kind: str, shape: tuple[int, ...], device: str) -> Tensor:
    """(N, *spatial): ``scene``, objects of some 60 pixels; ``smooth``, of some 20; ``noise``, independent
    pixels."""
    batch, classes, *space = shape
    if kind == "noise":
        return torch.randint(classes, (batch, *space), device=device)
    cells = [max(2, round(n / (60 if kind == "scene" else 40)) + 1) for n in space]
    coarse = torch.randn(batch, min(classes, 32), *cells, device=device)
    mode = "bilinear" if len(space) == 2 else "trilinear"
    return F.interpolate(coarse, space, mode=mode, align_corners=True).argmax(1)


def unfold_form(input: Tensor, target: Tensor, kernel_size: int, p: float = 5.0) -> Tensor:
    """The loss with default options by F.unfold: every window of logits and labels written out."""
    batch, classes, height, width = input.shape
    r, taps = kernel_size // 2, kernel_size**2
    values = F.unfold(input, kernel_size, padding=r).view(batch, classes, taps, height, width)
    shifted = F.pad(target, [r] * 4, value=-1).to(input.dtype)[:, None]
    same = F.unfold(shifted, kernel_size).view(batch, taps, height, width) == target[:, None]
    offsets = torch.arange(-r, r + 1, device=input.device)
    weight = torch.exp(-0.5 * torch.maximum(offsets[:, None].abs(), offsets.abs()).flatten() ** 2)
    weight = same * weight.to(input.dtype).view(1, taps, 1, 1)
    pooled = (values * weight[:, None]).sum(2) / weight.sum(1, keepdim=True)
    losses = F.cross_entropy(pooled, target, reduction="none")
    largest = losses.max().detach()
    return largest * (losses / largest).pow(p).mean().pow(1 / p)


def peak_bytes(step, device: str) -> int:
    """Most bytes allocated at once beyond those alive before ``step``."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def forced(method: str, loss):
    """``loss`` by the given loop where that takes it. (Its backward has no loop of its own: at stride 1 the
    gradient is made with the loss.)"""

    def call() -> Tensor:
        os.environ["DYNPLAN_REGION_METHOD"] = method
        try:
            return loss()
        finally:
            del os.environ["DYNPLAN_REGION_METHOD"]

    return call


def rivals(input: Tensor, target: Tensor, options: dict, arguments) -> dict:
    """Name to loss; ``cross_entropy`` comes first and is what ratios are to."""
    smoothing = options["label_smoothing"]
    losses = {"cross_entropy": lambda: F.cross_entropy(input, target, label_smoothing=smoothing)}
    for k in arguments.kernel:
        each = options | {"kernel_size": k}
        losses[f"dynplan {k}"] = lambda each=each: region_cross_entropy(input, target, **each)
        for method in arguments.method:
            losses[f"{method} {k}"] = forced(method, losses[f"dynplan {k}"])
        if arguments.fast:
            continue
        losses[f"shift {k}"] = lambda each=each: reference.region_cross_entropy(input, target, **each)
        fits = input.dim() == 4 and input.numel() * input.element_size() * k * k <= LARGEST_UNFOLD
        if fits and options == DEFAULTS:
            losses[f"unfold {k}"] = lambda k=k: unfold_form(input, target, k)
        if arguments.compile:
            form = torch.compile(reference.region_cross_entropy)
            losses[f"compiled shift {k}"] = lambda each=each, form=form: form(input, target, **each)
    return losses


def check(losses: dict, input: Tensor, target: Tensor, options: dict) -> None:
    """Every windowed loss equals the reference in fp64, within what its dtype can hold."""
    exact = {}
    for name, loss in losses.items():
        if name == "cross_entropy":
            continue
        k = int(name.split()[-1])
        if k not in exact:
            double = input.detach().double()
            exact[k] = reference.region_cross_entropy(double, target, kernel_size=k, **options).item()
        tolerance = 1e-4 if input.dtype == torch.float32 else 3e-2
        value = loss().item()
        assert math.isclose(value, exact[k], rel_tol=tolerance), f"{name}: {value}, expected {exact[k]}"


def bench(shape: str, label_kind: str, arguments) -> list[dict]:
    """One table: all rivals on one shape and label map."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    torch.manual_seed(0)
    input = (2 * torch.randn(SHAPES[shape], device=device)).to(dtype).requires_grad_()
    target = labels(label_kind, SHAPES[shape], device)
    options = {"merge": arguments.merge, "label_smoothing": arguments.label_smoothing}
    losses = rivals(input, target, options, arguments)
    if not arguments.unchecked:
        check(losses, input, target, options)

    def step(loss):
        return lambda: torch.autograd.grad(loss(), input)

    steps = {name: step(loss) for name, loss in losses.items()}
    timings = interleave(steps, rounds=arguments.rounds, settle=1)
    pixels, size = target.numel(), input.numel() * input.element_size()
    floor = 3 * size + 2 * target.numel() * target.element_size() + 16 * pixels
    table = Table(
        "loss", "p20 ms", "p50 ms", "p80 ms", "of cross_entropy", "bar", "GB/s of floor", "extra MB",
        "B/pixel",
        title=f"{shape} {SHAPES[shape]} {arguments.dtype}, {label_kind}, merge {arguments.merge}, "
        f"label smoothing {arguments.label_smoothing:g}, {torch.get_num_threads()} threads",
    )  # fmt: skip
    barred = shape == "voc-2" and label_kind != "noise" and dtype == torch.float32 and device == "cpu"
    barred = barred and options == DEFAULTS
    bars = {name: f"{bar:.2f}" for name, bar in BARS.items()} if barred else {}
    rows = []
    for name, timing in timings.items():
        extra = peak_bytes(steps[name], device)
        ratio = timing.p50 / timings["cross_entropy"].p50
        table.add_row(
            name, *(f"{t * 1e3:.2f}" for t in timing[:3]), f"{ratio:.2f}", bars.get(name, ""),
            f"{floor / timing.p50 / 1e9:.1f}", f"{extra / 1e6:.1f}", f"{(extra - size) / pixels:.1f}",
        )  # fmt: skip
        row = {"op": "region_cross_entropy", "impl": name, "shape": shape, "labels": label_kind}
        row |= {"dtype": arguments.dtype, "extra_bytes": extra, "floor_bytes": floor}
        rows.append(row | {n: v for n, v in options.items() if v != DEFAULTS[n]} | timing._asdict())
    console = Console()
    if not console.is_terminal:
        console.width = 130
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["voc-2"])
    parser.add_argument(
        "--labels", nargs="+", choices=["scene", "smooth", "noise"], default=["smooth", "scene"]
    )
    parser.add_argument("--kernel", nargs="+", type=int, default=[3, 5, 7])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[],
                        help="also force these CPU loops (float32, merged logits)")  # fmt: skip
    parser.add_argument("--merge", default="logits", choices=["logits", "probs"])
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="leave out torch.compile of the shift-and-add form")  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="cross_entropy and dynplan alone")
    parser.add_argument("--unchecked", action="store_true", help="skip the fp64 check (large shapes)")
    parser.add_argument("--history", type=Path, help="append the rows to this file of JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        row for shape in arguments.shape for kind in arguments.labels for row in bench(shape, kind, arguments)
    ]
    if arguments.history:
        append_history(arguments.history, [row | environment(arguments.device) for row in rows])


if __name__ == "__main__":
    main()
