"""The products of a conditional encoder layer on a GPU, tile by tile, beside the same through PyTorch.

    python bench/bench_cuda_products.py

Each of a layer's four products, bf16, by the profiler's kernel times: with the tile that the kernel chooses
from the active rows, with every tile forced, and through ``F.linear``. What the choice assumes of the chip is
in ``csrc/kernels/encoder/cuda/product.cuh``; where a forced tile beats the chosen one, that is
wrong. Ours gather, add bias and activate on the way. Every tile's result is checked to be the chosen one's,
bit for bit, before its time counts.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_cuda_dispatch import MODELS, Form, draw, kernel_seconds, layer_weights
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dynplan.benchmarking import append_history, environment
from dynplan.ops import build_dispatch, conditional_encoder_layer, pack_encoder_weights

DEVICE = torch.device("cuda")
PRODUCTS = ("qkv", "output", "up", "down")  # in the order of their launches
TILES = ("32x64", "64x64", "64x128", "128x128", "128x192", "128x256")
ROWS = (25, 200, 800, 1600, 3200, 4096, 8192, 16384)
LENGTH = 64  # of a sample; the last one is shorter


@contextmanager
def forced(tile: str | None) -> Iterator[None]:
    """Products take ``tile``; None: the one that they choose."""
    if tile is not None:
        os.environ["DYNPLAN_CUDA_TILE"] = tile
    try:
        yield
    finally:
        os.environ.pop("DYNPLAN_CUDA_TILE", None)


def kernel_times(call: Form, name: str, rounds: int) -> list[float]:
    """Median seconds of each of the four kernels with ``name`` in their names that a call launches."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type.name == "CUDA" and name in e.name]
    times = [1e-6 * e.device_time for e in sorted(kernels, key=lambda e: e.time_range.start)]
    if len(times) != rounds * len(PRODUCTS):
        raise AssertionError(
            f"bench_cuda_products: expected {rounds * len(PRODUCTS)} kernels {name}, got {len(times)}"
        )
    return torch.tensor(times).view(rounds, len(PRODUCTS)).median(0).values.tolist()


def forms_of(model_name: str, rows: int) -> tuple[Callable[[], Tensor], list[Form]]:
    """One layer on ``rows`` active rows, and its four products through PyTorch."""
    weights, sizes = layer_weights(model_name), MODELS[model_name]
    blob, heads = pack_encoder_weights(weights), sizes["num_attention_heads"]
    hidden, up = draw(rows, sizes["hidden_size"]), draw(rows, sizes["intermediate_size"])
    offsets = torch.arange(0, rows + LENGTH, LENGTH, dtype=torch.int32, device=DEVICE).clamp_max(rows)
    everybody = torch.ones(len(offsets) - 1, dtype=torch.bool, device=DEVICE)
    dispatch = build_dispatch(everybody, offsets, rows)
    theirs = [
        lambda: F.linear(hidden, weights.qkv_weight, weights.qkv_bias),
        lambda: F.linear(hidden, weights.output_weight),
        lambda: F.linear(hidden, weights.up_weight, weights.up_bias),
        lambda: F.linear(up, weights.down_weight),
    ]
    return lambda: conditional_encoder_layer(hidden, dispatch, None, heads, packed_weights=blob), theirs


def measure(model_name: str, rows: int, rounds: int) -> list[dict]:
    """A record for each product: seconds by tile, chosen and through PyTorch."""
    layer, theirs = forms_of(model_name, rows)
    wanted, by_tile = layer(), {}
    chosen = kernel_times(layer, "product_kernel", rounds)
    for tile in TILES:
        with forced(tile):
            if not torch.equal(layer(), wanted):
                raise AssertionError(f"bench_cuda_products: expected {tile} to give the chosen tile's bits")
            by_tile[tile] = kernel_times(layer, "product_kernel", rounds)
    return [
        {
            "op": "cuda_product",
            "shape": f"{model_name} {product} {rows}",
            "seconds": chosen[i],
            "linear_seconds": kernel_seconds(theirs[i], ""),
            "tiles": {tile: times[i] for tile, times in by_tile.items()},
        }
        for i, product in enumerate(PRODUCTS)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--active", nargs="+", type=int, default=list(ROWS), help="active rows")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--history", type=Path, default=Path(__file__).with_name("history") / "cuda.jsonl")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_cuda_products: expected a CUDA device and a CUDA build of torch, found none")
    table = Table("product, active rows", "us", *TILES, "F.linear", "rate of it", title="microseconds")
    with torch.no_grad():
        for model_name in options.models:
            for rows in options.active:
                found = measure(model_name, rows, options.rounds)
                append_history(options.history, [row | environment(DEVICE.type) for row in found])
                for row in found:
                    times = (row["seconds"], *row["tiles"].values(), row["linear_seconds"])
                    rate = f"{row['linear_seconds'] / row['seconds']:.2f}"
                    table.add_row(row["shape"], *(f"{1e6 * time:.1f}" for time in times), rate)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
