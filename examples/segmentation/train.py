"""Train one network with one loss, and score it."""

import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Classes, Split
from .losses import LossOptions, build
from .metrics import Scores
from .model import SegmentationNet, resize


class Settings(NamedTuple):
    """Everything of a run but its loss and seed. Crops are (height, width) in pixels of the scaled images."""

    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    epochs: int = 12
    batch_size: int = 8
    crop: tuple[int, int] = (160, 192)


class Run(NamedTuple):
    """A trained network, and what its training took as JSON types."""

    model: SegmentationNet
    result: dict


def fit(
    train: Split,
    classes: Classes,
    loss: LossOptions,
    settings: Settings,
    seed: int,
    pretrained: bool = True,
    progress: bool = True,
) -> Run:
    """The seed fixes the decoder's initial weights, the order of the samples, the crops and the flips, so
    that two losses with one seed see the same batches. The final weights are kept, none is scored before.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = SegmentationNet(len(classes.names), pretrained=pretrained)
    criterion = build(loss, classes.ignore_id, frequencies(train.labels, len(classes.names)))
    optimizer = torch.optim.AdamW(
        model.parameter_groups(settings.learning_rate), weight_decay=settings.weight_decay, fused=True
    )
    batches = len(train.images) // settings.batch_size
    if batches == 0:
        raise ValueError(
            f"expected at least batch_size = {settings.batch_size} images, got {len(train.images)}"
        )
    steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    features = [_early(model, images) for images in (train.images, train.images.flip(-1))]
    labels = [train.labels, train.labels.flip(-1)]
    means, started, cpu_started = [], time.perf_counter(), time.process_time()
    loss_seconds = 0.0
    for epoch in tqdm(range(settings.epochs), desc=f"{loss}, seed {seed}", disable=not progress):
        model.train()
        total = 0.0
        order = torch.randperm(len(train.images), generator=generator)[: batches * settings.batch_size]
        for step, index in enumerate(order.split(settings.batch_size)):
            inputs, target = crop_and_flip(features, labels, index, settings.crop, generator)
            optimizer.zero_grad(set_to_none=True)
            logits = resize(model.late(inputs), target.shape[-2:])
            loss_started = time.process_time()
            value = criterion(logits, target.long(), (epoch * batches + step) / steps)
            (gradient,) = torch.autograd.grad(value, logits)
            loss_seconds += time.process_time() - loss_started
            logits.backward(gradient)
            optimizer.step()
            schedule.step()
            total += value.item()
        means.append(total / batches)
    cpu_seconds = time.process_time() - cpu_started
    result = {
        "loss": loss._asdict(),
        "settings": settings._asdict(),
        "seed": seed,
        "training_loss": means,
        "seconds": time.perf_counter() - started,
        "step_cpu_seconds": cpu_seconds / steps,
        "loss_cpu_seconds": loss_seconds / steps,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    return Run(model, result)


def crop_and_flip(
    features: list[Tensor],
    labels: list[Tensor],
    index: Tensor,
    crop: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One random crop and one random left-right flip for each sample, the same for its labels.

    ``features`` and ``labels`` hold the samples as they are and flipped. Crops begin at multiples of the
    features' stride.
    """
    stride = SegmentationNet.STRIDE
    height, width = (min(c, s) // stride for c, s in zip(crop, labels[0].shape[1:], strict=True))
    out_features, out_labels = [], []
    for i in index.tolist():
        flip = int(torch.randint(2, (), generator=generator))
        top, left = (
            int(torch.randint(size // stride - cut + 1, (), generator=generator))
            for size, cut in zip(labels[0].shape[1:], (height, width), strict=True)
        )
        out_features.append(features[flip][i, :, top : top + height, left : left + width])
        rows, columns = (slice(stride * a, stride * (a + n)) for a, n in ((top, height), (left, width)))
        out_labels.append(labels[flip][i, rows, columns])
    inputs = torch.stack(out_features).contiguous(memory_format=torch.channels_last)
    return inputs, torch.stack(out_labels)


def frequencies(labels: Tensor, classes: int) -> Tensor:
    """Share of each class among the pixels with a class."""
    counts = torch.bincount(labels.flatten().int(), minlength=classes)[:classes].float()
    return counts / counts.sum()


@torch.no_grad()
def evaluate(model: SegmentationNet, split: Split, classes: Classes, progress: bool = True) -> dict:
    """:meth:`Scores.summary` of the logits interpolated to the size of the masks as they came."""
    model.eval()
    scores = Scores(len(classes.names), classes.ignore_id)
    parts = torch.arange(len(split.images)).split(4)
    for part in tqdm(parts, desc="scoring", disable=not progress):
        masks = split.full_labels[part]
        logits = resize(model.late(model.early(split.images[part])), masks.shape[1:])
        scores.update(logits.softmax(1), masks)
    return scores.summary()


def _early(model: SegmentationNet, images: Tensor) -> Tensor:
    return torch.cat([model.early(part) for part in images.split(16)])
