"""Planned encoders on a GPU beside every form a user would otherwise run: one table a case, one run.

    python bench/bench_cuda_dispatch.py                everything (BERT-base and the 12-layer small encoder)
    python bench/bench_cuda_dispatch.py --no-compile   without torch.compile, which takes most of the time
    python bench/bench_cuda_dispatch.py --quick        of that batches 8 and 128, lengths up to 128

Weights are random, shapes are real, numbers bf16. Every form is checked against Hugging Face's model, or
against the naive form at the same plan, before it is timed; dynplan's forms are CUDA graphs. ``of ideal`` is
the time over keep-all's scaled by the work kept; ``break-even`` the largest share of layers at which dynplan
is as fast as a rival that computes all of them. Last come the bars: what is hoped of an H200, met or not.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from bars import Bar, report
from cuda_rivals import Form, compiled, naive, padded, unpadded
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from transformers import BertConfig, BertModel

import dynplan
from dynplan.benchmarking import Timing, append_history, environment, interleave, recorded
from dynplan.cuda_graph import CapturedModel
from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
)
from dynplan.policies import FixedPath, KeepAll

DEVICE = torch.device("cuda")
LAYERS = 12
MODELS = {
    "bert-base": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "small": dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536),
}
BATCHES = (1, 8, 32, 128)
LENGTHS = ("sst2", "64-128", "512")
SHARES = (1.0, 0.75, 0.5, 0.25)
RIVALS = ("hf sdpa graph", "unpadded graph")  # what break-even is told against
# Tokens of SST-2's dev sentences with BERT's uncased word pieces: the quantiles 0, 1/32, ..., 1 (mean 25.2).
SST2 = (4, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 24, 25, 26, 27, 28, 29, 30, 31, 32, 34,
        35, 36, 39, 40, 42, 46, 55)  # fmt: skip
# bf16 through 12 layers, two ways: what a token's hidden states may differ by, as a share of their length.
# (Those of Hugging Face on a CPU are 0.012 from fp32 on average and 0.014 at the worst token; single numbers
# stray ten times as far, so they say little.)
TOLERANCE = 0.05
ENOUGH_TOKENS = 4096  # from here on a share of the layers is to cost that share of the time


def lengths_of(kind: str, batch_size: int, generator: torch.Generator) -> Tensor:
    """Tokens per sample: as in SST-2, uniform 64..128, or 512."""
    if kind == "sst2":
        return torch.tensor(SST2)[torch.randint(len(SST2), (batch_size,), generator=generator)]
    if kind == "64-128":
        return torch.randint(64, 129, (batch_size,), generator=generator)
    return torch.full((batch_size,), 512)


def random_plan(batch_size: int, share: float, generator: torch.Generator) -> Tensor:
    """Every sample its own random path of one size, so that the share of layers is exact."""
    order = torch.rand(batch_size, LAYERS, generator=generator).argsort(1).argsort(1)
    return order < round(share * LAYERS)


def check(name: str, ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    """Raises where two last hidden states differ at a real token."""
    ours, theirs = ours.float()[mask.bool()], theirs.float()[mask.bool()]
    error = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()
    if not error <= TOLERANCE:
        raise AssertionError(
            f"bench_cuda_dispatch: expected {name} to be within {TOLERANCE}, got {error:.3f} off"
        )


class Case:
    """One model, batch and kind of lengths: the forms to time, checked when made.

    Attributes:
        forms: name -> call.
        tokens: of the batch.
        work: share of layers asked for -> share of token-layers in its plan.
    """

    def __init__(self, model_name: str, batch_size: int, kind: str, with_compiled: bool) -> None:
        generator = torch.Generator().manual_seed(batch_size)
        torch.manual_seed(0)
        config = BertConfig(num_hidden_layers=LAYERS, max_position_embeddings=512, **MODELS[model_name])
        with DEVICE:
            model = BertModel(config, add_pooling_layer=False).to(torch.bfloat16).eval()
        lengths = lengths_of(kind, batch_size, generator)
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
        inputs = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}
        self.model, self.batch_size, self.kind = model_name, batch_size, kind
        self.tokens = int(lengths.sum())
        self.forms = self._rivals(model, inputs, lengths, with_compiled)
        plans = {share: random_plan(batch_size, share, generator) for share in SHARES}
        self.work = {
            share: float((plan * lengths.unsqueeze(1)).sum()) / (LAYERS * self.tokens)
            for share, plan in plans.items()
        }
        self._add_plans(model, inputs, plans)

    @property
    def shape(self) -> str:
        return f"{self.model} {self.batch_size}x{self.kind}"

    @staticmethod
    def _rivals(
        model: BertModel, inputs: dict[str, Tensor], lengths: Tensor, with_compiled: bool
    ) -> dict[str, Form]:
        direct, packed = padded(model, inputs), unpadded(model, inputs, lengths)
        forms = {"hf sdpa": direct, "hf sdpa graph": recorded(direct)}
        forms |= {"unpadded": packed, "unpadded graph": recorded(packed)}
        if with_compiled:
            forms["hf compiled"] = compiled(model, inputs)
        wanted = direct()
        for name, form in forms.items():
            check(name, form(), wanted, inputs["attention_mask"])
        return forms

    def _add_plans(self, model: BertModel, inputs: dict[str, Tensor], plans: dict[float, Tensor]) -> None:
        swapped = dynplan.swap(copy.deepcopy(model), KeepAll())
        mask = inputs["attention_mask"]
        for share, plan in plans.items():
            self.forms[f"naive {share}"] = form = naive(model, inputs, plan.to(DEVICE))
            at_plan = form()
            if share == 1:
                check("naive 1.0", at_plan, self.forms["hf sdpa"](), mask)
            captured = self._captured(swapped, inputs, plan)
            check(f"dynplan {share}", captured(**inputs).last_hidden_state, at_plan, mask)
            self.forms[f"dynplan {share}"] = captured.replay
        nobody = torch.zeros(LAYERS, dtype=torch.bool)
        self.forms["dynplan 0.0"] = self._captured(swapped, inputs, nobody).replay

    @staticmethod
    def _captured(swapped: nn.Module, inputs: dict[str, Tensor], plan: Tensor) -> CapturedModel:
        captured = dynplan.capture(swapped, *inputs["input_ids"].shape)
        swapped.dynplan.policy = FixedPath(plan)
        captured(**inputs)
        return captured


def break_even(timings: dict[str, Timing], rival: str) -> float | None:
    """Largest share at which dynplan is as fast as ``rival``, between the measured ones; None: at none."""
    limit = timings[rival].p50
    points = [(share, timings[f"dynplan {share}"].p50) for share in (*SHARES, 0.0)]
    if points[0][1] <= limit:
        return 1.0
    for (high, slow), (low, fast) in zip(points, points[1:], strict=False):
        if fast <= limit <= slow:
            return low + (high - low) * (limit - fast) / (slow - fast)
    return None


def dispatch_seconds(rounds: int) -> float:
    """One ``build_dispatch`` of 12 layers at batch 128, 128 tokens a sample, from graphs of 50 of them."""
    keep = random_plan(128, 0.5, torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = torch.arange(0, 129 * 128, 128, dtype=torch.int32, device=DEVICE)
    many = recorded(lambda: [build_dispatch(keep, offsets, 128 * 128) for _ in range(50)])
    return interleave({"build_dispatch": many}, rounds)["build_dispatch"].p50 / 50


def draw(*shape: int) -> Tensor:
    """Random, of unit scale after a product over the last dimension."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / shape[-1] ** 0.5


def layer_weights(model_name: str) -> EncoderLayerWeights:
    """One layer's weights of a model's size."""
    width, inner = MODELS[model_name]["hidden_size"], MODELS[model_name]["intermediate_size"]
    attention = [draw(3 * width, width), draw(3 * width), draw(width, width), draw(width)]
    feed_forward = [draw(inner, width), draw(inner), draw(width, inner), draw(width)]
    norm = [torch.ones_like(attention[3]), torch.zeros_like(attention[3])]
    return EncoderLayerWeights(*attention, *norm, *feed_forward, *norm)


def empty_layer_seconds(rounds: int) -> float:
    """A layer of BERT-base's size that no sample takes, of 128 samples of 128 tokens, in a graph."""
    blob, heads = pack_encoder_weights(layer_weights("bert-base")), MODELS["bert-base"]["num_attention_heads"]
    offsets = torch.arange(0, 129 * 128, 128, dtype=torch.int32, device=DEVICE)
    rows = draw(128 * 128, MODELS["bert-base"]["hidden_size"])
    nobody = torch.zeros(128, LAYERS, dtype=torch.bool, device=DEVICE)

    def stack(layers: int) -> Form:
        dispatch = build_dispatch(nobody[:, :layers], offsets, len(rows))
        blobs = [blob] * layers
        return recorded(lambda: conditional_encoder(rows, dispatch, None, heads, packed_weights=blobs))

    # The copy of the rows is in both, and goes with the first layer.
    timings = interleave({"all": stack(LAYERS), "one": stack(1)}, rounds, warmup=3)
    return (timings["all"].p50 - timings["one"].p50) / (LAYERS - 1)


def product_rate(model_name: str) -> float | None:
    """Rate of a layer's four products on 4,096 rows over that of the same products through ``F.linear``.

    Both by the profiler's kernel times, since no op is a product alone. Ours gather, add bias and activate on
    the way. None: the profiler sees no kernels here.
    """
    weights, sizes = layer_weights(model_name), MODELS[model_name]
    blob, heads = pack_encoder_weights(weights), sizes["num_attention_heads"]
    rows, up = draw(ENOUGH_TOKENS, sizes["hidden_size"]), draw(ENOUGH_TOKENS, sizes["intermediate_size"])
    offsets = torch.arange(0, ENOUGH_TOKENS + 1, 64, dtype=torch.int32, device=DEVICE)
    everybody = torch.ones(len(offsets) - 1, dtype=torch.bool, device=DEVICE)
    dispatch = build_dispatch(everybody, offsets, ENOUGH_TOKENS)

    def ours() -> None:
        conditional_encoder_layer(rows, dispatch, None, heads, packed_weights=blob)

    def theirs() -> None:
        F.linear(rows, weights.qkv_weight, weights.qkv_bias)
        F.linear(rows, weights.output_weight)
        F.linear(rows, weights.up_weight, weights.up_bias)
        F.linear(up, weights.down_weight)

    mine, rival = kernel_seconds(ours, "product_kernel"), kernel_seconds(theirs, "")
    return rival / mine if mine and rival else None


def kernel_seconds(call: Form, name: str) -> float:
    """Seconds that kernels with ``name`` in their names take in a call, the mean of 20."""
    for _ in range(5):
        call()
    on_cuda = DEVICE.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(20):
            call()
        if on_cuda:
            torch.cuda.synchronize()
    events = profile.key_averages()
    return 1e-6 * sum(event.self_device_time_total for event in events if name in event.key) / 20


def bars_of(measured: list[tuple[Case, dict[str, Timing]]], rounds: int) -> list[Bar]:
    """What this run says of each hope."""

    def worst(form: str, rival: str, fits) -> float | None:
        return max((t[form].p50 / t[rival].p50 for case, t in measured if fits(case)), default=None)

    def many(case: Case) -> bool:
        return case.tokens >= ENOUGH_TOKENS

    def sentences(case: Case) -> bool:
        return case.batch_size == 128 and case.kind == "sst2"

    rates = [product_rate(name) for name in dict.fromkeys(case.model for case, _ in measured)]
    found = [rate for rate in rates if rate is not None]
    return [
        Bar(
            f"half of the layers at random, of keep-all, {ENOUGH_TOKENS} tokens and more",
            worst("dynplan 0.5", "dynplan 1.0", many),
            0.56,
        ),
        Bar("a quarter of the layers, likewise", worst("dynplan 0.25", "dynplan 1.0", many), 0.32),
        Bar("build_dispatch of 12 layers at batch 128, in us", 1e6 * dispatch_seconds(rounds), 12),
        Bar("a layer that no sample takes, at batch 128, in us", 1e6 * empty_layer_seconds(rounds), 14),
        Bar(
            "keep-all at batch 128 on SST-2's lengths, of Hugging Face padded in a graph",
            worst("dynplan 1.0", "hf sdpa graph", sentences),
            0.5,
        ),
        Bar(
            "rate of a layer's products, of F.linear's, 4096 rows",
            min(found, default=None),
            0.7,
            least=True,
        ),
    ]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model_name in options.models:
        for kind in options.lengths:
            for batch_size in options.batches:
                yield Case(model_name, batch_size, kind, options.compile)


def rows_of(case: Case, timings: dict[str, Timing]) -> list[dict]:
    here = {"op": "cuda_dispatch", "shape": case.shape, "dtype": "bfloat16", "baseline": "hf sdpa graph"}
    here |= environment(DEVICE.type)
    return [here | {"impl": name} | timing._asdict() for name, timing in timings.items()]


def table_of(case: Case, timings: dict[str, Timing]) -> Table:
    table = Table("form", "p50 ms", "of hf graph", "of ideal", title=f"{case.shape}, {case.tokens} tokens")
    rival, whole = timings["hf sdpa graph"].p50, timings["dynplan 1.0"].p50
    for name, timing in timings.items():
        share = float(name.split()[1]) if name.startswith("dynplan") else None
        ideal = "-" if not share else f"{timing.p50 / (whole * case.work[share]):.2f}"
        table.add_row(name, f"{timing.p50 * 1e3:.3f}", f"{timing.p50 / rival:.2f}", ideal)
    return table


def break_even_table(measured: list[tuple[Case, dict[str, Timing]]]) -> Table:
    table = Table("model", "lengths", "batch", *(f"against {rival}" for rival in RIVALS), title="break-even")
    for case, timings in measured:
        shares = [break_even(timings, rival) for rival in RIVALS]
        shown = ["-" if share is None else f"{share:.2f}" for share in shares]
        table.add_row(case.model, case.kind, str(case.batch_size), *shown)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batches 8 and 128, not 512, not compiled")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--history", type=Path, default=Path(__file__).with_name("history") / "cuda.jsonl")
    options = parser.parse_args(arguments)
    options.compile &= not options.quick
    options.batches = options.batches or ([8, 128] if options.quick else list(BATCHES))
    options.lengths = options.lengths or (["sst2", "64-128"] if options.quick else list(LENGTHS))
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_cuda_dispatch: expected a CUDA device and a CUDA build of torch, found none")
    console = Console()
    measured = []
    with torch.no_grad():
        for case in cases(options):
            timings = interleave(case.forms, options.rounds, warmup=5)
            case.forms = {}  # a case's graphs hold gigabytes
            measured.append((case, timings))
            append_history(options.history, rows_of(case, timings))
            console.print(table_of(case, timings))
        bars = bars_of(measured, options.rounds)
    console.print(break_even_table(measured))
    report("cuda_dispatch_bar", bars, options.history, DEVICE.type)


if __name__ == "__main__":
    main()
