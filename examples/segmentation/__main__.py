"""``python -m examples.segmentation train | study | report | time``: see the README beside this file."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from dynplan.benchmarking import environment

from . import report as tables
from .data import Classes, Split, find_split, load_classes, load_split
from .model import SegmentationNet
from .picture import write_curves, write_differences, write_masks
from .study import (
    CROSS_ENTROPY,
    PLAIN_MEAN,
    REGION,
    ablation_jobs,
    chosen_rates,
    learning_rate_jobs,
    main_jobs,
    read_rows,
    run_jobs,
    weights_path,
)
from .timing import time_step
from .train import LossOptions, Settings, channel_statistics, describe, fit, predict

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

DEFAULTS = Settings()
Part = Enum("Part", {name: name for name in ("learning-rate", "main", "ablation", "ablation-plain-mean")})
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
    loss: Annotated[str, typer.Option(help="cross-entropy or region.")] = "region",
    kernel_size: int = 5,
    sigma: float = 1.0,
    p: float = 5.0,
    merge: str = "logits",
    normalize: str = "weight",
    learning_rate: float = DEFAULTS.learning_rate,
    epochs: Epochs = DEFAULTS.epochs,
    seed: int = 0,
    height: Height = 120,
    width: Width = 160,
    threads: Threads = 2,
) -> None:
    """Train one network; print its scores; write scores.json, model.pt, curves.png and masks.png."""
    if loss not in ("cross-entropy", "region"):
        raise typer.BadParameter(f"expected cross-entropy or region, got {loss}", param_hint="--loss")
    torch.set_num_threads(threads)
    options = LossOptions(loss, kernel_size, sigma, p, merge, normalize)
    options = CROSS_ENTROPY if loss == "cross-entropy" else options
    classes, fitted, scored = _load(data, (height, width))
    output.mkdir(parents=True, exist_ok=True)
    run = fit(fitted, scored, classes, options, Settings(learning_rate=learning_rate, epochs=epochs), seed)
    row = {"part": "train", **run.result, **environment()}
    (output / "scores.json").write_text(json.dumps(row, indent=1) + "\n")
    torch.save(run.model.state_dict(), output / "model.pt")
    write_curves(output / "curves.png", {describe(options): [row]})
    _write_masks(output / "masks.png", fitted, scored, classes, {describe(options): run.model})
    _print_main([row], classes)


@app.command()
def study(
    data: Data,
    output: Output,
    part: Annotated[list[Part], typer.Option(help="Parts to run, in the order given.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. seeds - 1 (the learning rates have one).")] = 3,
    epochs: Epochs = DEFAULTS.epochs,
    height: Height = 120,
    width: Width = 160,
    threads: Threads = 2,
) -> None:
    """Run parts of the study. A stopped study continues where it was: finished runs are in runs.jsonl."""
    torch.set_num_threads(threads)
    classes, fitted, scored = _load(data, (height, width))
    output.mkdir(parents=True, exist_ok=True)
    path = output / "runs.jsonl"
    settings = Settings(epochs=epochs)
    for name in (entry.value for entry in part):
        if name == "learning-rate":
            jobs = learning_rate_jobs(settings)
        elif name == "main":
            jobs = main_jobs(settings, chosen_rates(read_rows(path)), seeds)
        else:
            base = REGION if name == "ablation" else PLAIN_MEAN
            jobs = ablation_jobs(name, base, settings, chosen_rates(read_rows(path)), seeds)
        for row in run_jobs(jobs, path, fitted, scored, classes, environment()):
            scores = row["scores"]
            print(
                f"{name}: {describe(LossOptions(**row['loss']))}, learning rate "
                f"{row['settings']['learning_rate']:g}, seed {row['seed']}: "
                f"mIoU {100 * scores['miou']:.2f} %, boundary F {100 * scores['boundary_f']:.2f} %, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )


@app.command()
def report(
    data: Data,
    output: Output,
    publish: Annotated[
        Path | None,
        typer.Option(
            help="Also write the raw figures and the charts (no picture of the data) below this folder."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of masks.png.")] = 4,
    height: Height = 120,
    width: Width = 160,
    threads: Threads = 2,
) -> None:
    """Print the tables of a study and write its pictures: curves.png, ablation.png, masks.png."""
    torch.set_num_threads(threads)
    rows = read_rows(output / "runs.jsonl")
    classes = load_classes(data)
    parts = {
        name: [row for row in rows if row["part"] == name] for name in dict.fromkeys(r["part"] for r in rows)
    }
    main_rows = parts.get("main", [])
    pictures = [output, *([publish / "images"] if publish else [])]
    if main_rows:
        _print_main(main_rows, classes)
        for folder in pictures:
            write_curves(folder / "region_loss_curves.png", tables.by_loss(main_rows))
        fitted, scored = (load_split(find_split(data, split), (height, width)) for split in ("train", "val"))
        chosen = scored.select(torch.linspace(0, len(scored.names) - 1, samples).long())
        networks = {
            describe(loss): _restore(output, loss, classes) for loss in (CROSS_ENTROPY, REGION, PLAIN_MEAN)
        }
        _write_masks(output / "masks.png", fitted, chosen, classes, networks)
    for name, base in (("ablation", REGION), ("ablation-plain-mean", PLAIN_MEAN)):
        if name not in parts:
            continue
        groups = tables.by_loss([*main_rows, *parts[name]])
        baseline = describe(base)
        seeds = {row["seed"] for row in parts[name]}
        print(f"\n## {name}, one factor changed from {baseline}\n")
        print(
            tables.comparison_table([r for g in groups.values() for r in g if r["seed"] in seeds], baseline)
        )
        differences = {
            loss: tables.paired(group, groups[baseline])
            for loss, group in groups.items()
            if loss != baseline and len(tables.paired(group, groups[baseline]))
        }
        for folder in pictures:
            write_differences(folder / f"region_loss_{name.replace('-', '_')}.png", differences, baseline)
    if publish:
        for name, part_rows in parts.items():
            _write_figures(publish / "results" / f"region_loss_{name.replace('-', '_')}.json", part_rows)


@app.command(name="time")
def time_(
    data: Data,
    rounds: int = 30,
    height: Height = 120,
    width: Width = 160,
    threads: Threads = 1,
    write: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Time the losses beside the network's forward and backward, on one real batch."""
    torch.set_num_threads(threads)
    classes, fitted, _ = _load(data, (height, width))
    rows = [{**row, **environment()} for row in time_step(fitted, classes, DEFAULTS, rounds)]
    lines = [
        [
            row["case"],
            f"{1e3 * row['cpu_seconds']['p50']:.2f}",
            f"{100 * row['share_of_step']:.1f} %" if "share_of_step" in row else "",
            f"{row['ratio_to_cross_entropy']:.2f}" if "share_of_step" in row else "",
        ]
        for row in rows
    ]
    print(tables.table(["forward + backward", "CPU ms", "share of the step", "of cross-entropy"], lines))
    if write:
        _write_figures(write, rows)


def _load(data: Path, size: tuple[int, int]) -> tuple[Classes, Split, Split]:
    return load_classes(data), *(load_split(find_split(data, split), size) for split in ("train", "val"))


def _restore(output: Path, loss: LossOptions, classes: Classes) -> SegmentationNet:
    model = SegmentationNet(len(classes.names)).to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(weights_path(output, loss, seed=0), weights_only=True))
    return model


def _write_masks(path: Path, fitted: Split, shown: Split, classes: Classes, networks: dict) -> None:
    statistics = channel_statistics(fitted.images)
    predictions = {
        name: predict(model, shown.images, *statistics).argmax(1) for name, model in networks.items()
    }
    write_masks(path, shown, predictions, classes)


def _print_main(rows: list[dict], classes: Classes) -> None:
    print("\n" + tables.comparison_table(rows, describe(CROSS_ENTROPY)))
    for score in ("iou_per_class", "boundary_f_per_class"):
        print(f"\n{score}, %\n\n" + tables.class_table(rows, classes.names, score))


def _write_figures(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps({k: _rounded(v) for k, v in row.items() if k != "key"}) for row in rows)
    path.write_text(f"[\n{text}\n]\n")


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value


if __name__ == "__main__":
    app()
