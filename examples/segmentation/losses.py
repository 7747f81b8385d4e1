"""The losses of the study, by name: rivals as their papers have them, and the region loss."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dynplan.ops import region_cross_entropy

# (logits (N, C, H, W), labels (N, H, W), share of the training that is done) -> loss
Criterion = Callable[[Tensor, Tensor, float], Tensor]
KINDS = ("cross-entropy", "weighted", "ohem", "focal", "dice", "lovasz", "region")


class LossOptions(NamedTuple):
    """``kind`` is one of :data:`KINDS`; the other options are those of "region".

    ``cross_entropy_share`` is the weight of cross-entropy in a mixture with the region loss. In the first
    ``warm_up`` of the training p rises from 1 to ``p``.
    """

    kind: str = "region"
    kernel_size: int = 5
    p: float = 2.0
    cross_entropy_share: float = 0.0
    warm_up: float = 0.0

    def __str__(self) -> str:
        if self.kind != "region":
            return {"dice": "Dice + cross-entropy", "lovasz": "Lovász + cross-entropy"}.get(
                self.kind, self.kind
            )
        words = [f"region, kernel {self.kernel_size}, p = {self.p:g}"]
        if self.cross_entropy_share:
            words.append(f"with {self.cross_entropy_share:g} of cross-entropy")
        if self.warm_up:
            words.append(f"p from 1 in the first {self.warm_up:.0%}")
        return ", ".join(words)


def build(options: LossOptions, ignore_id: int, frequency: Tensor) -> Criterion:
    """``frequency``: each class's share of the labelled training pixels, used by "weighted"."""
    weight = (frequency + 0.02).rsqrt()
    weight = weight / (weight * frequency).sum()

    def plain(logits: Tensor, labels: Tensor, done: float) -> Tensor:
        return cross_entropy(logits, labels, ignore_index=ignore_id)

    def weighted(logits: Tensor, labels: Tensor, done: float) -> Tensor:
        return cross_entropy(logits, labels, weight, ignore_index=ignore_id)

    def region(logits: Tensor, labels: Tensor, done: float) -> Tensor:
        risen = min(1.0, done / options.warm_up) if options.warm_up else 1.0
        p = 1 + risen * (options.p - 1)
        loss = region_cross_entropy(
            logits, labels, kernel_size=options.kernel_size, p=p, ignore_index=ignore_id
        )
        share = options.cross_entropy_share
        return (1 - share) * loss + share * plain(logits, labels, done) if share else loss

    def on_valid(loss: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
        def criterion(logits: Tensor, labels: Tensor, done: float) -> Tensor:
            valid = labels != ignore_id
            return loss(logits.movedim(1, -1)[valid], labels[valid])

        return criterion

    return {
        "cross-entropy": plain,
        "weighted": weighted,
        "ohem": on_valid(ohem),
        "focal": on_valid(focal),
        "dice": on_valid(lambda logits, labels: dice(logits, labels) + cross_entropy(logits, labels)),
        "lovasz": on_valid(lambda logits, labels: lovasz(logits, labels) + cross_entropy(logits, labels)),
        "region": region,
    }[options.kind]


# The functions below take the labelled pixels only: logits (M, C), labels (M,).


def ohem(logits: Tensor, labels: Tensor, threshold: float = 0.7, kept: float = 1 / 16) -> Tensor:
    """Online hard example mining: the mean over pixels whose class has a probability below ``threshold``,
    and over the hardest ``kept`` of all where those are fewer."""
    losses = cross_entropy(logits, labels, reduction="none").sort(descending=True).values
    count = int((losses.detach() > -math.log(threshold)).sum())
    return losses[: max(count, math.ceil(kept * len(losses)))].mean()


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Lin et al., arXiv 1708.02002, over the soft-max: the mean of ``-(1 - q)**gamma log(q)``."""
    losses = cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 minus the soft Dice score of the batch, the mean over the classes that the batch has."""
    probabilities = logits.softmax(1)
    members = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    both, either = (probabilities * members).sum(0), (probabilities + members).sum(0)
    return (1 - 2 * both / either)[members.any(0)].mean()


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Berman et al., arXiv 1705.08790: Lovász extension of 1 - IoU, mean over the classes of the batch."""
    probabilities = logits.softmax(1)
    losses = []
    for c in labels.unique():
        member = (labels == c).to(logits.dtype)
        errors, order = (member - probabilities[:, c]).abs().sort(descending=True)
        member = member[order]
        both = member.sum() - member.cumsum(0)
        either = member.sum() + (1 - member).cumsum(0)
        jaccard = 1 - both / either
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()
