"""What a loss costs inside a training step: forward, loss with its backward, backward through the network."""

import torch
from torch.nn.functional import cross_entropy

from dynplan.benchmarking import interleave
from dynplan.ops import region_cross_entropy

from .data import Classes, Split
from .model import SegmentationNet
from .train import Settings, augment, channel_statistics, normalize


def time_step(train: Split, classes: Classes, settings: Settings, rounds: int) -> list[dict]:
    """Seconds of the network's part of a step and of each loss with its gradient, in interleaved rounds.

    The losses take the logits of one real batch, in the layout the network gives them.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    index = torch.randperm(len(train.images), generator=generator)[: settings.batch_size]
    images, labels = augment(train.images[index], train.labels[index], settings.crop, generator)
    images = normalize(images, *channel_statistics(train.images))
    labels = labels.long()
    model = SegmentationNet(len(classes.names)).to(memory_format=torch.channels_last).train()
    leaf = model(images).detach().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(leaf, labels, ignore_index=classes.ignore_id), leaf)[0]

    def network():
        model(images).backward(gradient)

    def of(loss, **options):
        return lambda: torch.autograd.grad(
            loss(leaf, labels, ignore_index=classes.ignore_id, **options), leaf
        )

    cases = {"network": network, "cross-entropy": of(cross_entropy)}
    for kernel_size in (1, 3, 5, 7):
        cases[f"region k={kernel_size}"] = of(region_cross_entropy, kernel_size=kernel_size)
    timings = interleave(cases, rounds)
    step = timings["network"].p50
    return [
        {
            "case": name,
            "shape": list(leaf.shape),
            "seconds": timing._asdict(),
            "share_of_step": None if name == "network" else timing.p50 / (timing.p50 + step),
            "ratio_to_cross_entropy": timing.p50 / timings["cross-entropy"].p50,
        }
        for name, timing in timings.items()
    ]
