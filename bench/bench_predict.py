"""`dynplan predict` beside transformers' own pipeline over one file of sentences, checked, in one run.

    python bench/bench_predict.py --model FOLDER --input FILE.jsonl.gz
    python bench/bench_predict.py --memory

FOLDER is a BERT-family checkpoint with its tokenizer, which gets a fresh head; FILE holds one JSON object a
line with the text under --text. Both read the file, tokenize, run and write JSON lines with label and
probabilities; the model is loaded before. The file is cut into pieces, and on each all contestants run in
turn, so that a change of the machine's speed meets all of them. Prints rows a second, and the time as a share
of pipeline(batch_size=32)'s and of keep-all's; the same in processor time, which other work on the machine
changes less.

--memory: the largest memory of the whole command, workers included, at 10^5 and 10^6 rows of a tiny model.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import dynplan
from dynplan.benchmarking import append_history, environment
from dynplan.inference import ModelSettings, RunSettings, run
from dynplan.loading import quiet
from dynplan.policies import RandomPath
from dynplan.records import RecordFile

BUDGETS = (1.0, 0.75, 0.5, 0.25)
BAR = 0.40  # of the pipeline's time, at keep-all
RIVAL = "transformers pipeline, batch 32"
_ROWS = (10**5, 10**6)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint and its tokenizer")
    parser.add_argument("--input", type=Path, help="JSON lines, .gz or not")
    parser.add_argument("--text", default="sentence1", help="field of the text (default sentence1)")
    parser.add_argument("--rows", type=int, help="from the front (default all)")
    parser.add_argument("--piece", type=int, default=2048, help="rows between two contestants (default 2048)")
    parser.add_argument("--rival-pieces", type=int, help="random ones that the pipeline runs (default all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--history", type=Path, help="append the rows to this JSON-lines file")
    return parser.parse_args()


def prepare(source: Path, folder: Path) -> Path:
    """The checkpoint with a fresh head: for transformers as it is, for dynplan under random paths."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32)
    dynplan.swap(model, RandomPath(1.0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def run_pipeline(classify, source: Path, text: str, output: Path) -> None:
    def sentences():
        with open(source, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)[text]

    with open(output, "w", encoding="utf-8") as file:
        for scores in classify(sentences(), batch_size=32):
            row = {f"probability_{score['label']}": score["score"] for score in scores}
            file.write(json.dumps({"label": max(scores, key=lambda s: s["score"])["label"], **row}) + "\n")


def check(ours: Path, theirs: Path) -> None:
    """Before anything is timed: the same probabilities for the same rows."""
    found = [
        [json.loads(line)["probability_LABEL_1"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (ours, theirs)
    ]
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Run:
    """Of a contestant over a piece: rows, seconds, and processor seconds of all its threads."""

    rows: int
    seconds: float
    cpu: float


def timed(case: Callable[[], None], rows: int) -> Run:
    start, own = time.perf_counter(), time.process_time()
    case()
    return Run(rows, time.perf_counter() - start, time.process_time() - own)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, dict[int, Run]]:
    """Every contestant over the pieces it runs, by their number."""
    model_folder = prepare(options.model, folder / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(model_folder, attn_implementation="sdpa")
    classify = pipeline(
        "text-classification",
        model=theirs.eval(),
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        top_k=None,
        truncation=True,
        device="cpu",
    )
    source, outputs = folder / "piece.jsonl", (folder / "ours.jsonl", folder / "theirs.jsonl")
    base = ModelSettings(model_folder)
    settings = RunSettings(base, (source,), outputs[0], workers=0, window=options.piece)
    settings = replace(settings, columns=replace(settings.columns, text=options.text))
    model = base.load()

    def ours(budget: float) -> None:
        model.control.budget = budget
        outputs[0].unlink(missing_ok=True)
        run(settings, progress=False, model=model)

    cases = {RIVAL: lambda: run_pipeline(classify, source, options.text, outputs[1])}
    cases |= {f"dynplan predict, budget {budget:g}": lambda b=budget: ours(b) for budget in BUDGETS}
    records = [record.values for record in islice(iter(RecordFile(options.input)), options.rows)]
    pieces = [records[first : first + options.piece] for first in range(0, len(records), options.piece)]
    wanted = len(pieces) if options.rival_pieces is None else options.rival_pieces
    if not 1 <= wanted <= len(pieces):
        sys.exit(f"--rival-pieces: expected 1 to {len(pieces)}, got {wanted}")
    shared = set(random.Random(0).sample(range(len(pieces)), wanted))
    runs: dict[str, dict[int, Run]] = {name: {} for name in cases}
    for number, piece in enumerate(pieces):
        source.write_text("".join(json.dumps(values) + "\n" for values in piece), encoding="utf-8")
        if not number:
            run_pipeline(classify, source, options.text, outputs[1])
            ours(1.0)
            check(*outputs)
        for name, case in cases.items():
            if name != RIVAL or number in shared:
                runs[name][number] = timed(case, len(piece))
        here = [own[number] for own in runs.values() if number in own]
        rates = ", ".join(f"{run.rows / run.seconds:.0f}" for run in here)
        print(f"piece {number + 1} of {len(pieces)}, rows a second: {rates}", flush=True)
    report(options, runs)
    return runs


def ratio(runs: dict[int, Run], others: dict[int, Run], of: str) -> float:
    """Median over the pieces that both ran: one that the machine was busy with counts as one."""
    both = runs.keys() & others.keys()
    return statistics.median(getattr(runs[i], of) / getattr(others[i], of) for i in both)


def report(options: argparse.Namespace, runs: dict[str, dict[int, Run]]) -> None:
    where = environment()
    columns = ("of pipeline", "of keep-all", "CPU, of pipeline", "CPU, of keep-all")
    table = Table("contestant", "rows", "s", "rows a second", *columns)
    keep_all, rival = runs["dynplan predict, budget 1"], runs[RIVAL]
    count = {name: sum(run.rows for run in own.values()) for name, own in runs.items()}
    seconds = {name: sum(run.seconds for run in own.values()) for name, own in runs.items()}
    for name, own in runs.items():
        rate = statistics.median(run.rows / run.seconds for run in own.values())
        ratios = [ratio(own, other, of) for of in ("seconds", "cpu") for other in (rival, keep_all)]
        table.add_row(
            name, f"{count[name]}", f"{seconds[name]:.0f}", f"{rate:.0f}", *(f"{r:.3f}" for r in ratios)
        )
    console = Console(width=140)
    console.print(
        f"{options.input.name}, {options.threads} threads, {where['isa']}; rates and ratios are medians over "
        f"pieces of {options.piece} rows"
    )
    console.print(table)
    share = ratio(keep_all, rival, "seconds")
    verdict = "met" if share <= BAR else "NOT MET"
    console.print(f"keep-all takes {share:.3f} of the pipeline's time; at most {BAR} is asked for: {verdict}")
    if options.history:
        rows = [
            {"op": "predict", "impl": name, "shape": f"{count[name]} rows", "dtype": "float32", "p50": spent}
            | where
            for name, spent in seconds.items()
        ]
        append_history(options.history, rows)


def tiny_model(folder: Path) -> list[str]:
    """One layer of width 16 over a few words; returns the words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    names = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(98))]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return names[2:]


def measure_memory(folder: Path, threads: int) -> dict[int, float]:
    """Largest resident memory of a `dynplan predict`, MiB, by its number of rows."""
    words, draw, peaks = tiny_model(folder / "model"), random.Random(0), {}
    for count in _ROWS:
        source = folder / f"{count}.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(json.dumps({"sentence1": " ".join(draw.choices(words, k=12))}) + "\n")
        order = [
            sys.executable,
            __file__,
            "--peak",
            folder / "model",
            source,
            folder / f"{count}.parquet",
            threads,
        ]
        started = time.perf_counter()
        said = subprocess.run([*map(str, order)], stdout=subprocess.PIPE, check=True).stdout
        seconds = time.perf_counter() - started
        peaks[count] = float(said.split()[-1])
        print(f"{count} rows: {peaks[count]:.0f} MiB, {seconds:.0f} s", flush=True)
    print(f"ten times the rows take {peaks[_ROWS[1]] / peaks[_ROWS[0]]:.3f} of the memory")
    return peaks


def peak(model: str, source: str, output: str, threads: str) -> None:
    """A run, and the largest memory of this process and of its largest worker."""
    quiet()
    torch.set_num_threads(int(threads))
    run(RunSettings(ModelSettings(Path(model)), (source,), Path(output), batch_size=256), progress=False)
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(sum(resource.getrusage(user).ru_maxrss for user in users) / 1024)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            measure_memory(Path(folder), options.threads)
        else:
            compare(options, Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
    else:
        main()
