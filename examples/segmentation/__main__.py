"""``python -m examples.segmentation train | score | study | report``: see the README beside this file."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from dynplan.benchmarking import environment

from . import report as tables
from .data import Classes, find_split, hold_out, load_classes, load_frames, load_split
from .losses import KINDS, LossOptions
from .model import SegmentationNet
from .picture import write_masks
from .study import chosen_rate, jobs_of, rate_jobs, read_rows, run_jobs
from .train import Settings, evaluate, fit

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

DEFAULTS, LOSS = Settings(), LossOptions()
Part = Enum("Part", {name: name for name in ("rates", "choose", "main")})
Data = Annotated[
    Path, typer.Option(help="Folder with classes.json and the splits train and val (folders or zips).")
]
Output = Annotated[Path, typer.Option(help="Folder for results; made if missing.")]
Height = Annotated[int, typer.Option(help="Images and labels are scaled to this height.")]
Width = Annotated[int, typer.Option(help="Images and labels are scaled to this width.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


@app.command()
def train(
    data: Data,
    output: Output,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = LOSS.kind,
    kernel_size: int = LOSS.kernel_size,
    p: float = LOSS.p,
    cross_entropy_share: Annotated[
        float, typer.Option(help="Weight of cross-entropy in a mixture with the region loss.")
    ] = LOSS.cross_entropy_share,
    warm_up: Annotated[
        float, typer.Option(help="Part of the training in which p rises from 1.")
    ] = LOSS.warm_up,
    learning_rate: float = DEFAULTS.learning_rate,
    epochs: Epochs = DEFAULTS.epochs,
    seed: int = 0,
    held_out: Annotated[
        bool, typer.Option("--hold-out", help="Score on the last fifth of each training drive, not on val.")
    ] = False,
    height: Height = 180,
    width: Width = 240,
    threads: Threads = 2,
) -> None:
    """Train one network; print its scores; write scores.json and model.pt."""
    if loss not in KINDS:
        raise typer.BadParameter(f"expected one of {', '.join(KINDS)}, got {loss}", param_hint="--loss")
    torch.set_num_threads(threads)
    options = LossOptions(loss, kernel_size, p, cross_entropy_share, warm_up)
    options = options if loss == "region" else LossOptions(loss)
    classes = load_classes(data)
    fitted = load_split(find_split(data, "train"), (height, width))
    if held_out:
        fitted, scored = hold_out(fitted, share=0.2)
    else:
        scored = load_split(find_split(data, "val"), (height, width))
    output.mkdir(parents=True, exist_ok=True)
    run = fit(fitted, classes, options, Settings(learning_rate=learning_rate, epochs=epochs), seed)
    described = {**classes._asdict(), "colours": classes.colours.tolist()}
    torch.save(
        {"weights": run.model.state_dict(), "classes": described, "size": (height, width)},
        output / "model.pt",
    )
    row = {
        **run.result,
        "hold_out": held_out,
        "classes": classes.names,
        "scores": evaluate(run.model, scored, classes),
        "size": (height, width),
        **environment(),
    }
    (output / "scores.json").write_text(json.dumps(row, indent=1) + "\n")
    _print([row])


@app.command()
def score(
    weights: Annotated[Path, typer.Option(help="model.pt of a run.")],
    images: Annotated[Path, typer.Option(help="Folder of NAME.jpg or NAME.png.")],
    masks: Annotated[Path, typer.Option(help="Folder of NAME.png, pixel value = class id.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw the first four frames here.")] = None,
    threads: Threads = 2,
) -> None:
    """Score a trained network on a folder of frames; print the scores as JSON."""
    torch.set_num_threads(threads)
    model, classes, size = _restore(weights)
    split = load_frames(images, masks, size)
    print(json.dumps(evaluate(model, split, classes), indent=1))
    if picture:
        shown = split.select(torch.arange(min(4, len(split.names))))
        model.eval()
        with torch.no_grad():
            write_masks(picture, shown, {"prediction": model(shown.images).argmax(1)}, classes)


@app.command()
def study(
    data: Data,
    output: Output,
    part: Annotated[list[Part], typer.Option(help="Parts to run, in the order given.")],
    seed: Annotated[
        list[int] | None, typer.Option(help="Seeds of choose and main; 0 alone by default.")
    ] = None,
    loss: Annotated[str, typer.Option(help="Only losses whose name begins with this.")] = "",
    epochs: Epochs = DEFAULTS.epochs,
    height: Height = 180,
    width: Width = 240,
    threads: Threads = 2,
    at_once: Annotated[int, typer.Option(help="Runs beside each other, each with --threads.")] = 1,
) -> None:
    """Run parts of the study: rates, choose, main. What has been run already is not run again."""
    output.mkdir(parents=True, exist_ok=True)
    shared = [f"--data={data}", f"--height={height}", f"--width={width}", f"--threads={threads}"]
    for name in (entry.value for entry in part):
        if name == "rates":
            jobs = rate_jobs(epochs)
        else:
            rate = chosen_rate(read_rows(output), epochs)
            jobs = [job for one in seed or [0] for job in jobs_of(name, rate, epochs, one)]
            jobs = [job for job in jobs if str(job.loss).startswith(loss)]
        for row in run_jobs(jobs, output, shared, at_once):
            _print([row])


@app.command()
def report(
    study: Annotated[Path, typer.Option(help="Folder of a study, or the JSON file of its figures.")],
    write: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Print the tables of a study."""
    rows = read_rows(study) if study.is_dir() else json.loads(study.read_text())
    if write:
        tables.write_rows(write, rows)
    for heading, text in tables.tables(rows).items():
        print(f"### {heading}\n\n{text}\n")


def _restore(weights: Path) -> tuple[SegmentationNet, Classes, tuple[int, int]]:
    saved = torch.load(weights, weights_only=True)
    colours = np.array(saved["classes"]["colours"], np.uint8)
    classes = Classes(**{**saved["classes"], "colours": colours})
    model = SegmentationNet(len(classes.names), pretrained=False)
    model.load_state_dict(saved["weights"])
    return model, classes, saved["size"]


def _print(rows: list[dict]) -> None:
    print(tables.loss_table(rows), flush=True)


if __name__ == "__main__":
    app()
