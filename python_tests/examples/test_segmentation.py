"""The segmentation example on a made-up data set: coloured shapes, a few seconds in all."""

import itertools
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from dynplan.ops import region_cross_entropy
from examples.segmentation import report, study
from examples.segmentation.__main__ import app
from examples.segmentation.data import find_split, hold_out, load_classes, load_frames, load_split
from examples.segmentation.losses import KINDS, LossOptions, build, dice, focal, lovasz, ohem
from examples.segmentation.metrics import Scores
from examples.segmentation.model import SegmentationNet
from examples.segmentation.train import Settings, crop_and_flip, evaluate, fit

VOID = 3
COLOURS = np.array([[60, 120, 200], [200, 60, 60], [90, 200, 90], [0, 0, 0]], np.uint8)


def draw(rng: np.random.Generator, height: int = 96, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """An image of a ground, a box and a band, with noise; and its mask, with a strip of void."""
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(4, height // 2), rng.integers(4, width // 2)
    mask[top : top + 32, left : left + 40] = 1
    mask[height - rng.integers(12, 24) :] = 2
    image = COLOURS[mask] * rng.uniform(0.8, 1.1) + rng.normal(0, 12, (height, width, 3))
    mask[:, :4] = VOID
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
    return tuple(load_split(find_split(root, name), (48, 64), progress=False) for name in ("train", "val"))


def test_split_from_a_zip_and_from_a_folder(root, splits):
    train, val = splits
    classes = load_classes(root)
    assert classes.names == ("ground", "box", "band") and classes.ignore_id == VOID
    assert classes.colours[1].tolist() == COLOURS[1].tolist()
    assert len(train.names) == 16 and len(val.names) == 4
    assert train.images.shape == (16, 3, 48, 64) and train.images.dtype == torch.uint8
    assert train.labels.shape == (16, 48, 64) and train.full_labels.shape == (16, 96, 128)
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


def test_frames_of_two_folders_are_a_split(root, splits):
    frames = load_frames(root / "val" / "images", root / "val" / "masks", (48, 64), progress=False)
    assert frames.names == splits[1].names
    for ours, theirs in zip(frames[1:], splits[1][1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegmentationNet(3)


def test_model_keeps_any_size(model):
    model.eval()
    for size in ((48, 64), (61, 75)):
        assert model(torch.zeros(2, 3, *size, dtype=torch.uint8)).shape == (2, 3, *size)


def test_pretrained_weights_are_there(model):
    """ImageNet's first convolution is not the random one."""
    torch.manual_seed(0)
    assert not torch.equal(
        model.frozen[0][0].weight, SegmentationNet(3, pretrained=False).frozen[0][0].weight
    )


def one_hot(prediction, classes=3):
    return torch.nn.functional.one_hot(prediction.long(), classes).movedim(-1, 1).float()


def test_scores_against_sets():
    label = torch.randint(0, 4, (2, 9, 11), generator=torch.Generator().manual_seed(0))
    prediction = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(1))
    scores = Scores(3, ignore_id=VOID)
    scores.update(one_hot(prediction[:1]), label[:1].to(torch.uint8))
    scores.update(one_hot(prediction[1:]), label[1:].to(torch.uint8))
    valid = label != VOID
    for c in range(3):
        hit = ((label == c) & (prediction == c)).sum()
        either = (((label == c) | (prediction == c)) & valid).sum()
        assert scores.iou()[c].item() == pytest.approx((hit / either).item())
    accuracy = (prediction == label)[valid].float().mean().item()
    assert scores.pixel_accuracy() == pytest.approx(accuracy)
    assert scores.calibration_error() == pytest.approx(1 - accuracy)  # certain of everything


def test_calibration_error_by_hand():
    """Four pixels sure at 0.9, three right, and two at 0.6, both right: |3 - 3.6| + |2 - 1.2| over 6."""
    sure = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    probabilities = torch.stack([sure, 1 - sure]).view(1, 2, 1, 6)
    scores = Scores(2, ignore_id=VOID)
    scores.update(probabilities, torch.tensor([0, 0, 0, 1, 0, 0]).view(1, 1, 6))
    assert scores.calibration_error() == pytest.approx((0.6 + 0.8) / 6)


def test_boundary_score_forgives_the_tolerance_and_no_more():
    def line(column):
        label = torch.zeros(1, 20, 20, dtype=torch.int64)
        label[:, :, column:] = 1
        return label

    for shift, expected in ((0, 1.0), (2, 1.0), (3, 0.0)):
        scores = Scores(3, ignore_id=VOID, tolerance=2)
        scores.update(one_hot(line(10 + shift)), line(10))
        assert scores.boundary_f()[0].item() == expected
        assert scores.boundary_f()[2].isnan()  # neither labelled nor predicted
    empty = Scores(3, VOID)
    assert empty.iou().isnan().all() and empty.boundary_f().isnan().all()


def test_void_makes_no_boundary():
    label = torch.zeros(1, 20, 20, dtype=torch.int64)
    label[:, :, 10:] = VOID
    scores = Scores(3, ignore_id=VOID)
    scores.update(one_hot(torch.zeros_like(label)), label)
    assert scores.labelled.sum() == 0 and scores.predicted.sum() == 0
    assert scores.iou()[0] == 1


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return torch.randn(40, 4), torch.randint(0, 3, (40,))  # the last class is absent


def test_focal_and_ohem_pixel_by_pixel(pixels):
    logits, labels = pixels
    q = [logits[i].softmax(0)[labels[i]].item() for i in range(40)]
    assert focal(*pixels).item() == pytest.approx(sum(-((1 - x) ** 2) * math.log(x) for x in q) / 40)
    hard = [-math.log(x) for x in q if x < 0.7]
    assert ohem(*pixels).item() == pytest.approx(sum(hard) / len(hard))
    right = 20 * one_hot(labels, 4)  # none below the threshold: the hardest sixteenth of 40, rounded up
    losses = cross_entropy(right + logits, labels, reduction="none").sort(descending=True).values
    assert ohem(right + logits, labels).item() == pytest.approx(losses[:3].mean().item())


def test_dice_by_sets(pixels):
    logits, labels = pixels
    probabilities = logits.softmax(1)
    scores = []
    for c in range(3):
        member = (labels == c).float()
        both, either = (probabilities[:, c] * member).sum(), probabilities[:, c].sum() + member.sum()
        scores.append((1 - 2 * both / either).item())
    assert dice(*pixels).item() == pytest.approx(sum(scores) / 3)


def test_lovasz_is_the_extension_of_one_minus_iou():
    """At 0/1 errors it is the set function, and between two nested sets it is linear."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    for wrong in itertools.product((False, True), repeat=5):
        prediction = torch.where(torch.tensor(wrong), 1 - labels, labels)
        logits = 200 * one_hot(prediction, 2)
        losses = []
        for c in range(2):
            member, predicted = labels == c, prediction == c
            losses.append(1 - (member & predicted).sum() / (member | predicted).sum())
        assert lovasz(logits, labels).item() == pytest.approx(sum(losses).item() / 2, abs=1e-6)
    # Class 0's errors are (1 - t) everywhere, of which the extension is (1 - t) times that of all wrong.
    t = 0.3
    logits = torch.tensor([t, 1 - t]).log() * one_hot(labels, 2) + torch.tensor([1 - t, t]).log() * (
        1 - one_hot(labels, 2)
    )
    q = logits.softmax(1).gather(1, labels[:, None])
    assert torch.allclose(q, q[0].expand_as(q)) and lovasz(logits, labels).item() == pytest.approx(
        1 - q[0].item(), abs=1e-6
    )


def test_losses_leave_void_out_and_mix():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 8, 9), torch.randint(0, 4, (2, 8, 9))  # 3: void
    changed = torch.where(labels[:, None] == VOID, 100.0, logits)
    frequency = torch.tensor([0.5, 0.3, 0.2])
    for kind in KINDS:
        criterion = build(LossOptions(kind), VOID, frequency)
        torch.testing.assert_close(criterion(changed, labels, 0.5), criterion(logits, labels, 0.5))
    plain = cross_entropy(logits, labels, ignore_index=VOID)
    region = region_cross_entropy(logits, labels, 3, p=3.0, ignore_index=VOID)
    mixed = build(LossOptions(kernel_size=3, p=3.0, cross_entropy_share=0.25), VOID, frequency)
    torch.testing.assert_close(mixed(logits, labels, 1.0), 0.75 * region + 0.25 * plain)
    rising = build(LossOptions(kernel_size=1, p=3.0, warm_up=0.5), VOID, frequency)
    torch.testing.assert_close(rising(logits, labels, 0.0), plain)  # kernel 1, p = 1
    halfway = region_cross_entropy(logits, labels, 1, p=2.0, ignore_index=VOID)
    torch.testing.assert_close(rising(logits, labels, 0.25), halfway)


def test_crops_and_flips_of_features_follow_the_labels():
    """Features that are the labels of every fourth pixel stay so."""
    labels = torch.arange(24 * 32).view(1, 24, 32)
    both = [labels, labels.flip(-1)]
    features = [each[:, None, ::4, ::4].float() for each in both]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        inputs, target = crop_and_flip(features, both, torch.tensor([0]), (20, 28), generator)
        assert inputs.shape == (1, 1, 5, 7) and target.shape == (1, 20, 28)
        assert torch.equal(inputs[0, 0], target[0, ::4, ::4].float())
        seen.add(int(target[0, 0, 0]))
    assert len(seen) > 4  # both places along either axis, flipped and not


FEW = Settings(learning_rate=1e-2, epochs=4, batch_size=4, crop=(48, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns(root, splits, kind):
    classes = load_classes(root)
    run = fit(splits[0], classes, LossOptions(kind), FEW, seed=0, progress=False)
    losses = run.result["training_loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert evaluate(run.model, splits[1], classes, progress=False)["miou"] > 0.35


def test_a_run_repeats_and_leaves_early_layers_alone(root, splits, model):
    runs = [
        fit(splits[0], load_classes(root), study.CROSS_ENTROPY, FEW._replace(epochs=1), 3, progress=False)
        for _ in range(2)
    ]
    assert runs[0].result["training_loss"] == runs[1].result["training_loss"]
    for name, value in runs[0].model.frozen.state_dict().items():
        assert torch.equal(value, model.frozen.state_dict()[name])


def test_differences_are_paired_by_seed():
    def row(seed, miou):
        return {"seed": seed, "scores": {"miou": miou}}

    assert report.paired(
        [row(1, 0.5), row(0, 0.4), row(7, 0.9)], [row(0, 0.3), row(1, 0.2)]
    ).tolist() == pytest.approx([30, 10])
    assert report.spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_command_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATES", (1e-2,))
    runner = CliRunner()

    def call(*arguments):
        outcome = runner.invoke(app, [*map(str, arguments)])
        assert outcome.exit_code == 0, outcome.output
        return outcome.output

    out = tmp_path / "study"
    size = ["--data", root, "--height", "48", "--width", "64", "--threads", "1", "--epochs", "1"]
    one = ["study", "--output", out, "--part", "rates", "--part", "main", "--loss", "ohem", *size]
    assert "| cross-entropy | 1 |" in call(*one)
    assert "mIoU" not in call(*one)  # every run is there already
    rows = study.read_rows(out)
    assert [row["hold_out"] for row in rows] == [True, False]
    text = call("report", "--study", out, "--write", tmp_path / "figures.json")
    for expected in ("### Validation frames, 1 epochs, by class", "| IoU, % | ground | box | band |"):
        assert expected in text
    assert call("report", "--study", tmp_path / "figures.json") == text

    folder = out / rows[1]["name"]
    val = ["--images", root / "val" / "images", "--masks", root / "val" / "masks"]
    picture = tmp_path / "masks.png"
    scored = call("score", "--weights", folder / "model.pt", *val, "--picture", picture, "--threads", "1")
    assert json.loads(scored[scored.index("{") :]) == rows[1]["scores"] and picture.exists()


def test_command_line_errors(root, tmp_path):
    runner = CliRunner()
    outcome = runner.invoke(app, ["train", "--data", str(root), "--output", str(tmp_path), "--loss", "hinge"])
    assert outcome.exit_code != 0 and "got hinge" in outcome.output
    outcome = runner.invoke(app, ["study", "--data", str(root), "--output", str(tmp_path), "--part", "main"])
    assert "expected runs of every learning rate" in str(outcome.exception)
