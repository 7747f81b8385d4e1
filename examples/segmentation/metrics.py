"""Scores of a segmentation: intersection over union, and F-score of the boundaries."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d


class Scores:
    """Counts over a whole split, from which the scores are taken once at the end.

    Pixels whose label is ``ignore_id`` count nowhere: not in the confusion matrix, and neither they nor their
    neighbours' transitions into them make a boundary.

    The boundary F-score follows Csurka et al., "What is a good evaluation measure for semantic segmentation?"
    (BMVC 2013), with two choices of ours: distance is the chessboard distance, and matches are counted over
    the split before the ratio is taken, so that a class missing from an image needs no convention.

    Args:
        classes: number of classes.
        ignore_id: label of void pixels.
        tolerance: chessboard distance, in pixels, at which a boundary pixel still counts as found; None
            leaves the boundaries out, which cost more than all the rest.
    """

    def __init__(self, classes: int, ignore_id: int, tolerance: int | None = 2):
        self.classes, self.ignore_id, self.tolerance = classes, ignore_id, tolerance
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # (label, prediction)
        self.predicted = torch.zeros(2, classes, dtype=torch.float64)  # boundary pixels: matched, all
        self.labelled = torch.zeros(2, classes, dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add predictions and labels, both integer (N, H, W); predictions in 0..classes-1."""
        valid = label != self.ignore_id
        pair = label[valid].long() * self.classes + prediction[valid].long()
        self.confusion += torch.bincount(pair, minlength=self.classes**2).view(self.classes, self.classes)

        if self.tolerance is None:
            return
        found = self._boundaries(prediction, valid)
        true = self._boundaries(label, valid)
        width = 2 * self.tolerance + 1
        for count, boundary, other in ((self.predicted, found, true), (self.labelled, true, found)):
            reach = max_pool2d(other, (width, 1), stride=1, padding=(self.tolerance, 0))
            reach = max_pool2d(reach, (1, width), stride=1, padding=(0, self.tolerance))
            count[0] += (boundary * reach).sum((0, 2, 3))
            count[1] += boundary.sum((0, 2, 3))

    def iou(self) -> Tensor:
        """float64 (classes,); NaN for a class that is neither labelled nor predicted."""
        hit = self.confusion.diagonal().double()
        return hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit)

    def boundary_f(self) -> Tensor:
        """float64 (classes,); NaN for a class without a boundary in labels and predictions."""
        precision = self.predicted[0] / self.predicted[1]
        recall = self.labelled[0] / self.labelled[1]
        f = 2 * precision * recall / (precision + recall)
        missed = (self.predicted[1] + self.labelled[1] > 0) & f.isnan()
        return torch.where(missed, 0.0, f)

    def pixel_accuracy(self) -> float:
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    def summary(self) -> dict:
        """Means over the classes that occur, and the scores per class, as JSON types, shares of 1."""
        iou = self.iou()
        summary = {
            "miou": float(iou.nanmean()),
            "pixel_accuracy": self.pixel_accuracy(),
            "iou_per_class": _finite(iou),
        }
        if self.tolerance is not None:
            boundary = self.boundary_f()
            summary |= {"boundary_f": float(boundary.nanmean()), "boundary_f_per_class": _finite(boundary)}
        return summary

    def _boundaries(self, map_: Tensor, valid: Tensor) -> Tensor:
        """float (N, classes, H, W): pixels of a class with a valid 4-neighbour of another class."""
        edge = torch.zeros_like(valid)
        for axis in (1, 2):
            here, there = (map_.narrow(axis, start, map_.shape[axis] - 1) for start in (0, 1))
            both = (valid.narrow(axis, start, map_.shape[axis] - 1) for start in (0, 1))
            change = (here != there) & next(both) & next(both)
            edge.narrow(axis, 0, change.shape[axis]).logical_or_(change)
            edge.narrow(axis, 1, change.shape[axis]).logical_or_(change)
        ids = torch.arange(self.classes, device=map_.device)
        return ((map_[:, None] == ids[:, None, None]) & edge[:, None]).float()


def gradient_concentration(losses: Tensor, p: float, share: float = 0.9) -> float:
    """Smallest fraction of windows that together carry ``share`` of the weight l**(p-1) of a Minkowski mean.

    ``losses``: the valid windows' losses, any shape. ``share`` for p = 1, towards 0 when few windows rule the
    gradient.
    """
    weights = losses.flatten().double().pow(p - 1).sort(descending=True).values
    carried = weights.cumsum(0)
    needed = int((carried < share * carried[-1]).sum()) + 1
    return min(needed, weights.numel()) / max(weights.numel(), 1)


def _finite(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
