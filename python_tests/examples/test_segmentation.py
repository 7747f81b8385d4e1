"""The segmentation example on a made-up data set: coloured shapes, a few seconds in all."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from examples.segmentation.__main__ import app
from examples.segmentation.data import find_split, hold_out, load_classes, load_split
from examples.segmentation.metrics import Scores, gradient_concentration
from examples.segmentation.model import SegmentationNet
from examples.segmentation.report import paired, spread
from examples.segmentation.study import CROSS_ENTROPY, PLAIN_MEAN, REGION, ablation_losses
from examples.segmentation.train import LossOptions, Settings, describe, fit

VOID = 3
COLOURS = np.array([[60, 120, 200], [200, 60, 60], [90, 200, 90], [0, 0, 0]], np.uint8)


def draw(rng: np.random.Generator, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image of a ground, a box and a band, with noise; and its mask, with a strip of void."""
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(4, height // 2), rng.integers(4, width // 2)
    mask[top : top + 16, left : left + 20] = 1
    mask[height - rng.integers(6, 12) :] = 2
    image = COLOURS[mask] * rng.uniform(0.8, 1.1) + rng.normal(0, 12, (height, width, 3))
    mask[:, :2] = VOID
    return image.clip(0, 255).astype(np.uint8), mask


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few hundred values gain nothing from a second thread and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Train as a zip file, val as a folder."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    names = ["colour", "id", "name"]
    entries = [
        dict(zip(names, (COLOURS[i].tolist(), i, name), strict=True))
        for i, name in enumerate(["ground", "box", "band", "void"])
    ]
    (root / "classes.json").write_text(json.dumps({"ignore_id": VOID, "classes": entries}))
    for split, count in (("train", 16), ("val", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = draw(rng)
            stem = f"{'ab'[i % 2]}_{i:03d}"
            Image.fromarray(image).save(root / split / "images" / f"{stem}.jpg", quality=92)
            Image.fromarray(mask).save(root / split / "masks" / f"{stem}.png")
    with zipfile.ZipFile(root / "shapes_train.zip", "w") as archive:
        for path in sorted((root / "train").glob("*/*")):
            archive.write(path, path.relative_to(root / "train"))
            path.unlink()
    for folder in sorted((root / "train").rglob("*"), reverse=True):
        folder.rmdir()
    (root / "train").rmdir()
    return root


@pytest.fixture(scope="module")
def splits(root):
    return tuple(load_split(find_split(root, name), (24, 32), progress=False) for name in ("train", "val"))


def test_split_from_a_zip_and_from_a_folder(root, splits):
    train, val = splits
    classes = load_classes(root)
    assert classes.names == ("ground", "box", "band") and classes.ignore_id == VOID
    assert classes.colours[1].tolist() == COLOURS[1].tolist()
    assert len(train.names) == 16 and len(val.names) == 4
    assert train.images.shape == (16, 3, 24, 32) and train.images.dtype == torch.uint8
    assert train.labels.shape == (16, 24, 32) and train.full_labels.shape == (16, 48, 64)
    # the nearest pixel: no label that the mask does not have, and void kept
    assert train.labels.unique().tolist() == [0, 1, 2, VOID]
    assert torch.equal(train.labels, train.full_labels[:, 1::2, 1::2])


def test_hold_out_takes_the_end_of_each_drive(splits):
    fitted, held = hold_out(splits[0], share=0.25)
    assert held.names == ("a_012", "a_014", "b_013", "b_015")
    assert sorted(fitted.names + held.names) == sorted(splits[0].names)
    unnamed = splits[0]._replace(names=tuple(str(i) for i in range(16)))
    assert hold_out(unnamed, share=0.25)[1].names == ("12", "13", "14", "15")
    with pytest.raises(ValueError, match="expected enough images to hold out 25% of them, got 1"):
        hold_out(unnamed.select(torch.tensor([0])), share=0.25)


def test_data_errors_say_what_was_expected(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"expected a folder test/ or one \*test.zip, got neither"):
        find_split(root, "test")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="expected images/NAME.jpg or .png, got none"):
        load_split(tmp_path, (8, 8), progress=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "one.jpg")
    with pytest.raises(ValueError, match="expected masks/one.png beside images/one.jpg"):
        load_split(tmp_path, (8, 8), progress=False)
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "masks" / "one.png")
    with pytest.raises(ValueError, match="expected masks of class ids, got mode RGB for one"):
        load_split(tmp_path, (8, 8), progress=False)
    (tmp_path / "classes.json").write_text(
        json.dumps({"ignore_id": 9, "classes": [{"id": 1, "name": "x", "colour": [0, 0, 0]}]})
    )
    with pytest.raises(ValueError, match=r"expected learned ids 0..C-1, got \[1\]"):
        load_classes(tmp_path)


def test_model_keeps_any_size():
    for size in ((24, 32), (37, 50)):
        assert SegmentationNet(5)(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_scores_against_sets():
    label = torch.randint(0, 4, (2, 9, 11), generator=torch.Generator().manual_seed(0))
    prediction = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(1))
    scores = Scores(3, ignore_id=VOID)
    scores.update(prediction[:1], label[:1].to(torch.uint8))
    scores.update(prediction[1:], label[1:].to(torch.uint8))
    valid = label != VOID
    for c in range(3):
        hit = ((label == c) & (prediction == c)).sum()
        either = (((label == c) | (prediction == c)) & valid).sum()
        assert scores.iou()[c].item() == pytest.approx((hit / either).item())
    assert scores.pixel_accuracy() == pytest.approx((prediction == label)[valid].float().mean().item())


def test_boundary_score_forgives_the_tolerance_and_no_more():
    def line(column):
        label = torch.zeros(1, 20, 20, dtype=torch.int64)
        label[:, :, column:] = 1
        return label

    for shift, expected in ((0, 1.0), (2, 1.0), (3, 0.0)):
        scores = Scores(3, ignore_id=VOID, tolerance=2)
        scores.update(line(10 + shift), line(10))
        assert scores.boundary_f()[0].item() == expected
        assert scores.boundary_f()[2].isnan()  # neither labelled nor predicted
    assert Scores(3, VOID).summary()["iou_per_class"] == [None] * 3


def test_void_makes_no_boundary():
    label = torch.zeros(1, 20, 20, dtype=torch.int64)
    label[:, :, 10:] = VOID
    scores = Scores(3, ignore_id=VOID)
    scores.update(torch.zeros_like(label), label)
    assert scores.labelled.sum() == 0 and scores.predicted.sum() == 0
    assert scores.iou()[0] == 1


def test_gradient_concentration():
    assert gradient_concentration(torch.ones(1000), p=5) == pytest.approx(0.9, abs=2e-3)
    assert gradient_concentration(torch.rand(1000), p=1) == pytest.approx(0.9, abs=2e-3)
    spike = torch.full((1000,), 1e-2)
    spike[0] = 10
    assert gradient_concentration(spike, p=5) == 1e-3


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, REGION, PLAIN_MEAN], ids=describe)
def test_a_run_learns_and_repeats(root, splits, loss):
    settings = Settings(learning_rate=1e-2, epochs=5, batch_size=4, crop=(20, 28))
    classes = load_classes(root)
    run = fit(*splits, classes, loss, settings, seed=0, progress=False)
    assert run.result["scores"]["miou"] > 0.5
    assert run.result["curves"]["loss"][-1] < run.result["curves"]["loss"][0]
    again = fit(*splits, classes, loss, settings, seed=0, progress=False)
    assert again.result["curves"] == run.result["curves"]


def test_one_pixel_windows_and_a_plain_mean_train_as_cross_entropy(root, splits):
    settings = Settings(epochs=1, batch_size=4)
    losses = [
        fit(*splits, load_classes(root), loss, settings, seed=3, progress=False).result["curves"]["loss"][0]
        for loss in (CROSS_ENTROPY, LossOptions(kernel_size=1, p=1.0))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_ablation_changes_one_factor_at_a_time():
    for base in (REGION, PLAIN_MEAN):
        losses = ablation_losses(base)
        assert len(losses) == len(set(losses))
        for loss in losses:
            assert sum(a != b for a, b in zip(loss, base, strict=True)) == 1


def test_differences_are_paired_by_seed():
    def row(seed, miou):
        return {"seed": seed, "scores": {"miou": miou}}

    assert paired(
        [row(1, 0.5), row(0, 0.4), row(7, 0.9)], [row(0, 0.3), row(1, 0.2)]
    ).tolist() == pytest.approx([30, 10])
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_command_line(root, tmp_path):
    size = ["--data", str(root), "--height", "24", "--width", "32", "--threads", "1"]
    runner = CliRunner()

    def call(*arguments):
        outcome = runner.invoke(app, [*arguments, *size])
        assert outcome.exit_code == 0, outcome.output
        return outcome.output

    out = tmp_path / "study"
    one = ["study", "--output", str(out), "--epochs", "1", "--seeds", "1"]
    parts = [word for name in ("learning-rate", "main", "ablation") for word in ("--part", name)]
    first = call(*one, *parts)
    assert "main: cross-entropy" in first and "ablation: region k=3" in first
    assert "mIoU" not in call(*one, *parts)  # every run is there already
    published = tmp_path / "docs"
    text = call("report", "--output", str(out), "--publish", str(published), "--samples", "2")
    for expected in ("| box |", "one factor changed from region (defaults)", "mIoU minus cross-entropy"):
        assert expected in text
    assert (out / "masks.png").exists() and not list(published.rglob("masks.png"))
    assert {path.name for path in published.rglob("*.*")} == {
        "region_loss_curves.png",
        "region_loss_ablation.png",
        "region_loss_learning_rate.json",
        "region_loss_main.json",
        "region_loss_ablation.json",
    }
    rows = json.loads((published / "results" / "region_loss_main.json").read_text())
    assert [row["loss"]["kind"] for row in rows] == ["cross-entropy", "region", "region"]

    call("train", "--output", str(tmp_path / "one"), "--epochs", "1", "--kernel-size", "3")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "scores.json",
        "model.pt",
        "curves.png",
        "masks.png",
    }
    assert "region k=7" in call("time", "--rounds", "1")


def test_command_line_errors(root, tmp_path):
    runner = CliRunner()
    outcome = runner.invoke(app, ["train", "--data", str(root), "--output", str(tmp_path), "--loss", "dice"])
    assert outcome.exit_code != 0 and "expected cross-entropy or region, got dice" in outcome.output
    outcome = runner.invoke(app, ["study", "--data", str(root), "--output", str(tmp_path), "--part", "main"])
    assert "expected learning-rate runs of both kinds" in str(outcome.exception)
