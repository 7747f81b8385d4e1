"""The encoder on real sentences: Hugging Face sdpa on padded batches beside dynplan, checked, in one run.

    python bench/bench_sst2_encoder.py --model FOLDER --sentences FILE.jsonl.gz

FOLDER is a BERT checkpoint with its tokenizer; FILE holds one JSON object a line with the text under --key.
Prints the time of every contestant (keep-all also on int8 and bfloat16 weights), its ratio to sdpa and to
keep-all, and the share of the machine's GEMM rate that keep-all reaches, counted over the operations of real
tokens only. --width and --layers make a random model of another size.
"""

import argparse
import copy
import gzip
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

import dynplan
from dynplan.benchmarking import append_history, environment, interleave
from dynplan.policies import FixedPath, KeepAll

SHARES = (0.75, 0.5, 0.25)
# Relative error that a reduced type is let through with: a sanity bound, `dynplan evaluate` tells the score.
REDUCED = {"int8": 0.35, "bfloat16": 0.05}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a BERT checkpoint and its tokenizer")
    parser.add_argument("--sentences", type=Path, required=True, help="JSON lines, .gz or not")
    parser.add_argument("--key", default="sentence1", help="field of the text (default sentence1)")
    parser.add_argument("--count", type=int, default=256, help="sentences from the front (default 256)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--width", type=int, help="random weights of this width, 64 per head, 4x feed-forward"
    )
    parser.add_argument("--layers", type=int, default=12, help="with --width (default 12)")
    parser.add_argument(
        "--weights", nargs="*", choices=REDUCED, default=list(REDUCED), help="reduced weights to time too"
    )
    parser.add_argument("--history", type=Path, help="append the rows to this JSON-lines file")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[BertModel, list[dict]]:
    """The Hugging Face model with sdpa, and the padded batches."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.width:
        torch.manual_seed(0)
        vocabulary = AutoConfig.from_pretrained(options.model).vocab_size
        width = options.width
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=options.layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        config._attn_implementation = "sdpa"
        model = BertModel(config, add_pooling_layer=False)
    else:
        model = BertModel.from_pretrained(
            options.model, attn_implementation="sdpa", dtype=torch.float32, add_pooling_layer=False
        )
    opener = gzip.open if options.sentences.suffix == ".gz" else open
    with opener(options.sentences, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)[options.key] for line in lines][: options.count]
    batches = [
        dict(tokenizer(texts[i : i + options.batch], padding=True, return_tensors="pt"))
        for i in range(0, len(texts), options.batch)
    ]
    return model.eval(), batches


def random_paths(samples: int, layers: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """bool (samples, layers): for every sample its own round(share * layers) layers."""
    order = torch.rand(samples, layers, generator=generator).argsort(1)
    return order < round(share * layers)


def useful_operations(config, batches: list[dict]) -> int:
    """Multiplications and additions of the encoder's products on real tokens."""
    h, i = config.hidden_size, config.intermediate_size
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    return config.num_hidden_layers * sum(2 * n * (4 * h * h + 2 * h * i) + 4 * n * n * h for n in lengths)


def gemm_rate(config, rows: int) -> float:
    """Operations a second of torch's fastest product at the shapes of this model: its peak here and now."""
    h, i = config.hidden_size, config.intermediate_size
    cases, operations = {}, {}
    for depth, width in ((h, 3 * h), (h, h), (h, i), (i, h)):
        a, b = torch.randn(rows, depth), torch.randn(width, depth)
        dense, blocked = b.T.contiguous(), torch.ops.mkldnn._reorder_linear_weight(b)
        for name, call in {
            "mm": lambda a=a, b=dense: torch.mm(a, b),
            "onednn": lambda a=a, b=blocked: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
        }.items():
            cases[name, depth, width] = call
            operations[name, depth, width] = 2 * rows * depth * width
    timings = interleave(cases, rounds=20)
    return max(operations[case] / timing.p20 for case, timing in timings.items())


@torch.inference_mode()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rival, batches = load(options)
    ours = dynplan.swap(copy.deepcopy(rival))
    reduced = {weights: dynplan.swap(copy.deepcopy(rival), weights=weights) for weights in options.weights}
    layers = rival.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)

    def call(batch, policy):
        ours.dynplan.policy = policy
        return ours(**batch).last_hidden_state

    keep_all, totals = KeepAll(), {}
    for batch in batches:
        real = batch["attention_mask"].bool()
        exact = rival(**batch).last_hidden_state[real]
        torch.testing.assert_close(call(batch, keep_all)[real], exact, rtol=1e-4, atol=1e-4)
        for weights, model in reduced.items():
            error = (model(**batch).last_hidden_state[real] - exact).norm() / exact.norm()
            assert error < REDUCED[weights], f"{weights}: relative error {error:.3f}"
        cases = {
            "Hugging Face sdpa, padded": lambda batch=batch: rival(**batch),
            "dynplan keep-all": lambda batch=batch, policy=keep_all: call(batch, policy),
        }
        for share in SHARES:
            policy = FixedPath(random_paths(len(real), layers, share, generator))
            cases[f"dynplan random {share}"] = lambda batch=batch, policy=policy: call(batch, policy)
        for weights, model in reduced.items():
            cases[f"dynplan keep-all, {weights}"] = lambda batch=batch, model=model: model(**batch)
        for name, timing in interleave(cases, rounds=options.rounds, warmup=1).items():
            totals[name] = totals.get(name, 0.0) + timing.p50

    rate = useful_operations(rival.config, batches) / totals["dynplan keep-all"]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    peak = gemm_rate(rival.config, max(1, tokens // len(batches)))
    report(options, rival.config, totals, tokens, rate, peak)


def report(options, config, totals: dict[str, float], tokens: int, rate: float, peak: float) -> None:
    where = environment()
    table = Table("contestant", "s", "of sdpa", "of keep-all")
    sdpa, keep_all = totals["Hugging Face sdpa, padded"], totals["dynplan keep-all"]
    for name, seconds in totals.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / sdpa:.3f}", f"{seconds / keep_all:.3f}")
    console = Console()
    console.print(
        f"{options.count} sentences, {tokens} tokens, batch {options.batch}, {options.threads} threads, "
        f"width {config.hidden_size}, {config.num_hidden_layers} layers, {where['isa']}"
    )
    console.print(table)
    console.print(
        f"keep-all: {rate / 1e9:.0f} GFLOP/s over the whole encoder, "
        f"{rate / peak:.0%} of torch's best product ({peak / 1e9:.0f} GFLOP/s)"
    )
    if options.history:
        shape = f"sst2 b{options.batch} w{config.hidden_size} l{config.num_hidden_layers}"
        rows = [
            {"op": "encoder", "impl": name, "shape": shape, "dtype": "float32", "p50": seconds} | where
            for name, seconds in totals.items()
        ]
        append_history(options.history, rows)


if __name__ == "__main__":
    main()
