"""What a loss costs inside a training step: forward, loss with its backward, backward through the network."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dynplan.benchmarking import Timing
from dynplan.ops import region_cross_entropy

from .data import Classes, Split
from .model import SegmentationNet
from .train import Settings, augment, channel_statistics, normalize


def time_step(train: Split, classes: Classes, settings: Settings, rounds: int) -> list[dict]:
    """CPU seconds of the network's part of a step and of each loss with its gradient, in interleaved rounds.

    The losses take the logits of one real batch, in the layout the network gives them (channels-last) and
    copied to planes. CPU time, summed over the threads, because training shares its machine with others more
    often than a benchmark does; compare it with one thread only.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    index = torch.randperm(len(train.images), generator=generator)[: settings.batch_size]
    images, labels = augment(train.images[index], train.labels[index], settings.crop, generator)
    images = normalize(images, *channel_statistics(train.images))
    labels = labels.long()
    model = SegmentationNet(len(classes.names)).to(memory_format=torch.channels_last).train()
    logits = model(images).detach()
    gradient = torch.randn_like(logits)
    ignored = {"ignore_index": classes.ignore_id}

    cases = {"network": lambda: model(images).backward(gradient)}
    for layout in ("channels-last", "planes"):
        leaf = (logits if layout == "channels-last" else logits.contiguous()).requires_grad_()
        cases[f"cross-entropy, {layout}"] = partial(_loss, leaf, partial(cross_entropy, **ignored), labels)
        for kernel_size in (1, 3, 5, 7):
            loss = partial(region_cross_entropy, kernel_size=kernel_size, **ignored)
            cases[f"region k={kernel_size}, {layout}"] = partial(_loss, leaf, loss, labels)

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 2):  # two rounds to warm up
        for name, case in cases.items():
            start = time.process_time()
            case()
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    timings = {name: Timing.of(measured) for name, measured in seconds.items()}
    step = timings["network"].p50
    rows = []
    for name, timing in timings.items():
        row = {"case": name, "shape": list(logits.shape), "cpu_seconds": timing._asdict()}
        if name != "network":
            rival = timings[f"cross-entropy, {name.split(', ')[1]}"]
            row["share_of_step"] = timing.p50 / (timing.p50 + step)
            row["ratio_to_cross_entropy"] = timing.p50 / rival.p50
        rows.append(row)
    return rows


def _loss(leaf: Tensor, loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> None:
    torch.autograd.grad(loss(leaf, labels), leaf)
