"""Random sequences of what people do to a model, and every inference compared with an untouched twin.

``python python_tests/integrations/long_proof.py --operations 100000 --seed 0`` runs until that many
operations are done and prints what it saw. A mismatch prints its sequence and the seed for ``--replay``.
"""

import argparse
import itertools
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest's configuration does

import torch
import transformers
from integrations import proof_changes, proof_modules, proof_training
from integrations.proof_operations import ALWAYS, OPERATIONS, SOMETIMES
from integrations.proof_pair import Counts, Ended, Mismatch, Pair
from tqdm import tqdm

SHARE_OF_THEMES = 0.3
# Importing them fills the table of operations.
SOURCES = (proof_training, proof_modules, proof_changes)


def run_sequence(seed: int, counts: Counts, verbose: bool = False) -> Pair:
    """One model's life.

    Args:
        seed: of everything that is drawn.
        counts: what is seen is added to it.
        verbose: print each operation before its result is known.

    Raises:
        Mismatch: with the whole sequence in its text.
    """
    pair = Pair(seed, counts)
    draw = pair.random
    themes = {*ALWAYS, *(theme for theme in SOMETIMES if draw.random() < SHARE_OF_THEMES)}
    choices = [operation for operation in OPERATIONS if operation.theme in themes]
    weights = [operation.weight for operation in choices]
    length = draw.choice((20, 60, 120, 160))
    try:
        proof_changes.swap(pair)
        for _ in range(length):
            operation = draw.choices(choices, weights)[0]
            if verbose:
                print(f"{operation.name:30} {pair.log[-1]}", flush=True)
            operation.run(pair)
            counts.operations[operation.name] += 1
    except Ended:
        counts.operations["ended early"] += 1
    except Mismatch as mismatch:
        raise Mismatch(f"{mismatch}\n{pair.story()}") from mismatch
    except Exception as error:
        raise RuntimeError(f"the proof itself fails: {error!r}\n{pair.story()}") from error
    return pair


def seeds_from(seed: int):
    """Seeds of the sequences; a million for each seed of a run."""
    return itertools.count(seed * 1_000_000)


def prepare() -> None:
    """Tiny models want one thread; what PyTorch and others warn of is no matter here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def report(counts: Counts, seconds: float) -> str:
    """What was seen, as text."""
    total = counts.operations.total()
    lines = [f"{total} operations in {seconds:.0f} s, {total / max(seconds, 1e-9):.0f} a second"]
    lines += [f"  {count:8} {name}" for name, count in counts.operations.most_common()]
    lines += [
        f"{counts.comparisons} comparisons, {counts.planned} of them on plans that leave layers out",
        f"worst difference in float32: {counts.worst:.1e} of the largest value",
        f"{counts.refusals.total()} refusals by the swapped model alone",
    ]
    lines += [f"  {count:8} {name}" for name, count in counts.refusals.most_common()]
    lines += [f"{counts.raised.total()} errors raised by both"]
    lines += [f"  {count:8} {name}" for name, count in counts.raised.most_common()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000, help="how many to do")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument(
        "--replay", type=int, metavar="SEED", help="run the one sequence that a mismatch named"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="count mismatches, do not stop at the first"
    )
    options = parser.parse_args()
    prepare()
    counts, mismatches = Counts(), Counter()
    if options.replay is not None:
        print(run_sequence(options.replay, counts, verbose=True).story())
        return 0
    start, first = time.perf_counter(), None
    with tqdm(total=options.operations, unit="op", smoothing=0) as bar:
        for seed in seeds_from(options.seed):
            try:
                run_sequence(seed, counts)
            except Mismatch as mismatch:
                mismatches[str(mismatch).partition("\n")[0]] += 1
                first = first or str(mismatch)
                tqdm.write(f"seed {seed}: {str(mismatch).partition(chr(10))[0]}")
                if not options.keep_going:
                    break
            except RuntimeError:
                print(report(counts, time.perf_counter() - start))  # what was seen is not lost
                raise
            bar.update(counts.operations.total() - bar.n)
            if counts.operations.total() >= options.operations:
                break
    print(report(counts, time.perf_counter() - start))
    if first is None:
        return 0
    print(f"{mismatches.total()} sequences with a mismatch")
    for text, count in mismatches.most_common(40):
        print(f"  {count:6} {text}")
    print(f"The first: {first}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
