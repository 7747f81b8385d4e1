"""Planned encoders on a GPU beside every form a user would otherwise run: one table, one run.

    python bench/bench_cuda_dispatch.py             everything (BERT-base and the 12-layer small encoder)
    python bench/bench_cuda_dispatch.py --quick     batch 32 at SST-2's lengths, no torch.compile

Weights are random, shapes are real. Every form is checked against Hugging Face's model, or against the naive
form at the same plan, before it is timed. ``ideal`` is keep-all's time scaled by the work kept,
``break-even`` the share of layers at which dynplan takes as long as Hugging Face's padded model in a CUDA
graph.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import dynplan
from dynplan.benchmarking import Timing, append_history, environment, interleave
from dynplan.policies import FixedPath, KeepAll

MODELS = {
    "bert-base": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "small": dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536),
}
BATCHES = (1, 8, 32, 128)
SHARES = (1.0, 0.75, 0.5, 0.25)
# Tokens of SST-2's dev sentences with BERT's uncased word pieces: the quantiles 0, 1/32, ..., 1 (mean 25.2).
SST2 = (4, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 24, 25, 26, 27, 28, 29, 30, 31, 32, 34,
        35, 36, 39, 40, 42, 46, 55)  # fmt: skip
# bf16 through 12 layers, two ways: what the outputs of unit scale may differ by.
TOLERANCE = 0.15


def lengths_of(kind: str, batch_size: int, generator: torch.Generator) -> Tensor:
    """Tokens per sample: as in SST-2, uniform 64..128, or 512."""
    if kind == "sst2":
        return torch.tensor(SST2)[torch.randint(len(SST2), (batch_size,), generator=generator)]
    if kind == "64-128":
        return torch.randint(64, 129, (batch_size,), generator=generator)
    return torch.full((batch_size,), 512)


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def unpadded(model: BertModel, inputs: dict[str, Tensor], lengths: Tensor) -> Callable[[], Tensor]:
    """Full depth on packed rows with PyTorch's flash attention for sequences of any length."""
    from torch.nn.attention.varlen import varlen_attn

    heads = model.config.num_attention_heads
    slots = inputs["attention_mask"].flatten().nonzero().squeeze(1)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).int().to(slots.device)
    longest = int(lengths.max())
    shape = inputs["input_ids"].shape
    weights = [
        (
            torch.cat([getattr(layer.attention.self, name).weight for name in ("query", "key", "value")]),
            torch.cat([getattr(layer.attention.self, name).bias for name in ("query", "key", "value")]),
        )
        for layer in model.encoder.layer
    ]

    def run() -> Tensor:
        hidden = model.embeddings(inputs["input_ids"]).flatten(0, 1).index_select(0, slots)
        for layer, (weight, bias) in zip(model.encoder.layer, weights, strict=True):
            q, k, v = F.linear(hidden, weight, bias).view(len(slots), 3, heads, -1).unbind(1)
            context = varlen_attn(q, k, v, offsets, offsets, longest, longest).flatten(1)
            hidden = layer.attention.output(context, hidden)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return (
            hidden.new_zeros(shape[0] * shape[1], hidden.shape[1])
            .index_copy(0, slots, hidden)
            .view(*shape, -1)
        )

    return run


def naive(model: BertModel, inputs: dict[str, Tensor], keep: Tensor) -> Callable[[], Tensor]:
    """What one writes first: pick the samples of each layer on the host, run it on them, put them back."""
    mask = inputs["attention_mask"].bool()[:, None, None, :]

    def run() -> Tensor:
        hidden = model.embeddings(inputs["input_ids"])
        for index, layer in enumerate(model.encoder.layer):
            kept = keep[:, index].nonzero().squeeze(1)
            if len(kept):
                output = layer(hidden.index_select(0, kept), mask.index_select(0, kept))
                output = output[0] if isinstance(output, tuple) else output
                hidden = hidden.index_copy(0, kept, output)
        return hidden

    return run


def check(name: str, ours: Tensor, theirs: Tensor, mask: Tensor) -> None:
    """Raises where two last hidden states differ at real tokens."""
    error = (ours.float() - theirs.float())[mask.bool()].abs().max().item()
    if not error <= TOLERANCE:
        raise AssertionError(
            f"bench_cuda_dispatch: expected {name} to be within {TOLERANCE}, got {error:.3f} off"
        )


class Case:
    """One model, batch and kind of lengths: the forms to time, checked when made."""

    def __init__(self, model_name: str, batch_size: int, kind: str, compiled: bool) -> None:
        generator = torch.Generator().manual_seed(batch_size)
        torch.manual_seed(0)
        config = BertConfig(num_hidden_layers=12, max_position_embeddings=512, **MODELS[model_name])
        model = BertModel(config, add_pooling_layer=False).to("cuda", torch.bfloat16).eval()
        self.shape = f"{model_name} {batch_size}x{kind}"
        lengths = lengths_of(kind, batch_size, generator)
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
        inputs = {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}
        mask = inputs["attention_mask"]

        def direct() -> Tensor:
            return model(**inputs).last_hidden_state

        wanted = direct()
        self.forms = {
            "hf sdpa": direct,
            "hf sdpa graph": recorded(direct),
            "unpadded": unpadded(model, inputs, lengths),
        }
        if compiled:
            fast = torch.compile(model, mode="max-autotune")
            self.forms["hf compiled"] = lambda: fast(**inputs).last_hidden_state
        plans = {share: self._plan(batch_size, share, generator) for share in SHARES}
        work = {
            share: (plan * lengths.unsqueeze(1)).sum() / (12 * lengths.sum()) for share, plan in plans.items()
        }
        self.work = {share: float(part) for share, part in work.items()}
        at_plan = {}
        for share, plan in plans.items():
            form = naive(model, inputs, plan.cuda())
            self.forms[f"naive {share}"] = form
            at_plan[share] = form()
        for name, form in self.forms.items():
            if not name.startswith("naive"):
                check(name, form(), wanted, mask)
        check("naive 1.0", at_plan[1.0], wanted, mask)

        swapped = BertModel(config, add_pooling_layer=False).to("cuda", torch.bfloat16).eval()
        swapped.load_state_dict(model.state_dict())
        dynplan.swap(swapped, KeepAll())
        for share, plan in plans.items():
            captured = dynplan.capture(swapped, batch_size, longest)
            swapped.dynplan.policy = FixedPath(plan)
            check(f"dynplan {share}", captured(**inputs).last_hidden_state, at_plan[share], mask)
            self.forms[f"dynplan {share}"] = captured.replay
        self.forms["dynplan 0.0"] = self._empty(swapped, batch_size, longest, inputs)

    @staticmethod
    def _plan(batch_size: int, share: float, generator: torch.Generator) -> Tensor:
        # Every sample its own random path of one size, so that the share of layers is exact.
        order = torch.rand(batch_size, 12, generator=generator).argsort(1).argsort(1)
        return order < round(share * 12)

    @staticmethod
    def _empty(
        swapped: nn.Module, batch_size: int, longest: int, inputs: dict[str, Tensor]
    ) -> Callable[[], Tensor]:
        captured = dynplan.capture(swapped, batch_size, longest)
        swapped.dynplan.policy = FixedPath(torch.zeros(12, dtype=torch.bool))
        captured(**inputs)
        return captured.replay

    def break_even(self, timings: dict[str, Timing]) -> float | None:
        """Share at which dynplan takes as long as Hugging Face's graph, between the measured ones."""
        rival = timings["hf sdpa graph"].p50
        points = [(share, timings[f"dynplan {share}"].p50) for share in (*SHARES, 0.0)]
        for (high, slow), (low, fast) in zip(points, points[1:], strict=False):
            if fast <= rival <= slow:
                return low + (high - low) * (rival - fast) / (slow - fast)
        return 1.0 if points[0][1] < rival else None


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model_name in options.models:
        for kind in options.lengths:
            for batch_size in options.batches:
                # 128 x 512 tokens is 65,536 rows: beyond what sentences need.
                if kind == "512" and batch_size > 32:
                    continue
                yield Case(model_name, batch_size, kind, not options.quick)


def rows_of(case: Case, timings: dict[str, Timing]) -> list[dict]:
    here = {"op": "cuda_dispatch", "shape": case.shape, "dtype": "bfloat16", "baseline": "hf sdpa graph"}
    here |= environment("cuda")
    return [here | {"impl": name} | timing._asdict() for name, timing in timings.items()]


def table_of(case: Case, timings: dict[str, Timing]) -> Table:
    even = case.break_even(timings)
    title = f"{case.shape}: break-even share {'-' if even is None else f'{even:.2f}'}"
    table = Table("form", "p50 ms", "of hf graph", "of ideal", title=title)
    rival, whole = timings["hf sdpa graph"].p50, timings["dynplan 1.0"].p50
    for name, timing in timings.items():
        share = float(name.split()[1]) if name.startswith("dynplan") else None
        ideal = "-" if not share else f"{timing.p50 / (whole * case.work[share]):.2f}"
        table.add_row(name, f"{timing.p50 * 1e3:.3f}", f"{timing.p50 / rival:.2f}", ideal)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="batch 32 and SST-2 lengths, without torch.compile"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument(
        "--lengths", nargs="+", choices=("sst2", "64-128", "512"), default=["sst2", "64-128", "512"]
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--history", type=Path, default=Path(__file__).with_name("history") / "cuda.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_dispatch: expected a CUDA device and a CUDA build of torch, found none")
    if options.quick:
        options.batches, options.lengths = [32], ["sst2"]
    console = Console()
    with torch.no_grad():
        for case in cases(options):
            timings = interleave(case.forms, options.rounds, warmup=5)
            append_history(options.history, rows_of(case, timings))
            console.print(table_of(case, timings))


if __name__ == "__main__":
    main()
