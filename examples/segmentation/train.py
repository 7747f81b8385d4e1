"""Train one network with one loss, and score it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from dynplan.nn import RegionCrossEntropyLoss
from dynplan.ops import region_cross_entropy

from .data import Classes, Split
from .metrics import Scores, gradient_concentration
from .model import SegmentationNet


class LossOptions(NamedTuple):
    """``kind`` is "cross-entropy", which has no options, or "region", whose options are the others."""

    kind: str = "region"
    kernel_size: int = 5
    sigma: float = 1.0
    p: float = 5.0
    merge: str = "logits"
    normalize: str = "weight"

    def build(self, ignore_id: int) -> Callable[[Tensor, Tensor], Tensor]:
        if self.kind == "cross-entropy":
            return nn.CrossEntropyLoss(ignore_index=ignore_id)
        return RegionCrossEntropyLoss(**self.windows(), p=self.p, ignore_index=ignore_id)

    def windows(self) -> dict:
        """The options that make the loss of a window, without those that average the windows."""
        return {name: getattr(self, name) for name in ("kernel_size", "sigma", "merge", "normalize")}


class Settings(NamedTuple):
    """Everything of a run but its loss and seed. Crops are (height, width) in pixels of the scaled images."""

    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    epochs: int = 12
    batch_size: int = 4
    crop: tuple[int, int] = (96, 128)
    evaluate_every: int = 3


class Run(NamedTuple):
    """A trained network, and as JSON types its scores, its curves and what it was trained with."""

    model: SegmentationNet
    result: dict


def fit(
    train: Split,
    test: Split,
    classes: Classes,
    loss: LossOptions,
    settings: Settings,
    seed: int,
    progress: bool = True,
) -> Run:
    """Train on ``train``; score on ``test`` now and then (for the curve only) and with the final weights.

    The seed fixes the initial weights, the order of the samples, the crops and the flips, so that two losses
    with one seed see the same batches. No weights are picked by their score.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mean, std = channel_statistics(train.images)
    model = SegmentationNet(len(classes.names)).to(memory_format=torch.channels_last)
    criterion = loss.build(classes.ignore_id)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    batches = len(train.images) // settings.batch_size
    if batches == 0:
        raise ValueError(
            f"expected at least batch_size = {settings.batch_size} images, got {len(train.images)}"
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches, pct_start=0.1
    )
    curves: dict[str, list] = {"loss": [], "epoch": [], "miou": []}
    started, cpu_started = time.perf_counter(), time.process_time()
    epochs = tqdm(range(1, settings.epochs + 1), desc=f"{describe(loss)}, seed {seed}", disable=not progress)
    for epoch in epochs:
        model.train()
        total = 0.0
        order = torch.randperm(len(train.images), generator=generator)[: batches * settings.batch_size]
        for index in order.split(settings.batch_size):
            images, labels = augment(train.images[index], train.labels[index], settings.crop, generator)
            optimizer.zero_grad(set_to_none=True)
            value = criterion(model(normalize(images, mean, std)), labels.long())
            value.backward()
            optimizer.step()
            schedule.step()
            total += value.item()
        curves["loss"].append(total / batches)
        if epoch % settings.evaluate_every == 0 and epoch < settings.epochs:
            scores, _ = evaluate(model, test, classes, mean, std, thorough=False)
            curves["epoch"].append(epoch)
            curves["miou"].append(scores["miou"])
            epochs.set_postfix(loss=total / batches, miou=curves["miou"][-1])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    scores, full_scores = evaluate(model, test, classes, mean, std, thorough=True)
    curves["epoch"].append(settings.epochs)
    curves["miou"].append(scores["miou"])
    result = {
        "loss": loss._asdict(),
        "settings": settings._asdict(),
        "seed": seed,
        "scores": scores,
        "full_resolution_scores": full_scores,
        "gradient_concentration": concentration(model, train, classes, loss, mean, std),
        "curves": curves,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    return Run(model, result)


def augment(
    images: Tensor, labels: Tensor, crop: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One random crop and one random left-right flip for each image, the same for its labels."""
    height, width = (min(c, s) for c, s in zip(crop, labels.shape[1:], strict=True))
    out_images, out_labels = [], []
    for image, label in zip(images, labels, strict=True):
        top = int(torch.randint(label.shape[0] - height + 1, (), generator=generator))
        left = int(torch.randint(label.shape[1] - width + 1, (), generator=generator))
        image = image[:, top : top + height, left : left + width]
        label = label[top : top + height, left : left + width]
        if torch.rand((), generator=generator) < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        out_images.append(image)
        out_labels.append(label)
    return torch.stack(out_images), torch.stack(out_labels)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 images scaled to 0..1, each (1, 3, 1, 1)."""
    values = images.permute(1, 0, 2, 3).flatten(1).float() / 255
    return values.mean(1).view(1, 3, 1, 1), values.std(1).view(1, 3, 1, 1)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def predict(model: SegmentationNet, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logits of uint8 images, in evaluation mode."""
    model.eval()
    return model(normalize(images, mean, std))


def evaluate(
    model: SegmentationNet, split: Split, classes: Classes, mean: Tensor, std: Tensor, thorough: bool
) -> tuple[dict, dict | None]:
    """:meth:`Scores.summary` at the training resolution. ``thorough`` adds the boundaries, and a second
    summary: of the upsampled logits against the masks as they came. These cost more than the network.
    """
    scores = Scores(len(classes.names), classes.ignore_id, tolerance=2 if thorough else None)
    full = Scores(len(classes.names), classes.ignore_id, tolerance=None) if thorough else None
    for part in torch.arange(len(split.images)).split(16):
        logits = predict(model, split.images[part], mean, std)
        scores.update(logits.argmax(1), split.labels[part])
        if full is not None:
            masks = split.full_labels[part]
            full.update(interpolate(logits, masks.shape[1:], mode="bilinear").argmax(1), masks)
    return scores.summary(), full.summary() if full is not None else None


def concentration(
    model: SegmentationNet, split: Split, classes: Classes, loss: LossOptions, mean: Tensor, std: Tensor
) -> float:
    """:func:`gradient_concentration` of the loss over at most 32 images, at the trained weights."""
    logits, labels = predict(model, split.images[:32], mean, std), split.labels[:32].long()
    valid = labels != classes.ignore_id
    if loss.kind == "cross-entropy":
        losses = cross_entropy(logits, labels, ignore_index=classes.ignore_id, reduction="none")
        return gradient_concentration(losses[valid], 1)
    losses = region_cross_entropy(
        logits, labels, **loss.windows(), ignore_index=classes.ignore_id, reduction="none"
    )
    return gradient_concentration(losses[valid], loss.p)


def describe(loss: LossOptions) -> str:
    """Short name: the options that differ from the defaults."""
    if loss.kind == "cross-entropy":
        return loss.kind
    names = {"kernel_size": "k", "sigma": "sigma", "p": "p", "merge": "merge", "normalize": "normalize"}
    changed = [
        f"{short}={getattr(loss, name)}"
        for name, short in names.items()
        if getattr(loss, name) != LossOptions._field_defaults[name]
    ]
    return f"region {', '.join(changed)}".strip() if changed else "region (defaults)"
