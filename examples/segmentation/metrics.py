"""Scores of a segmentation: intersection over union, F-score of the boundaries, calibration."""

import torch
from torch import Tensor


class Scores:
    """Counts over a whole split, from which the scores are taken once at the end.

    Pixels whose label is ``ignore_id`` count nowhere: not in the confusion matrix, and neither they nor their
    neighbours' transitions into them make a boundary.

    The boundary F-score follows Csurka et al., "What is a good evaluation measure for semantic segmentation?"
    (BMVC 2013), with two choices of ours: distance is the chessboard distance, and matches are counted over
    the split before the ratio is taken, so that a class missing from an image needs no convention.

    The calibration error is that of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), over
    pixels, with 15 bins.

    Args:
        classes: number of classes, at most 63.
        ignore_id: label of void pixels.
        tolerance: chessboard distance, in pixels, at which a boundary pixel still counts as found.
    """

    BINS = 15

    def __init__(self, classes: int, ignore_id: int, tolerance: int = 3):
        self.classes, self.ignore_id, self.tolerance = classes, ignore_id, tolerance
        self.bins = torch.zeros(3, self.BINS, dtype=torch.float64)  # pixels, right ones, sum of confidences
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # (label, prediction)
        self.predicted = torch.zeros(2, classes, dtype=torch.float64)  # boundary pixels: matched, all
        self.labelled = torch.zeros(2, classes, dtype=torch.float64)

    def update(self, probabilities: Tensor, label: Tensor) -> None:
        """Add probabilities (N, classes, H, W) and integer labels (N, H, W)."""
        confidence, prediction = probabilities.max(1)
        valid = label != self.ignore_id
        bins = (confidence[valid] * self.BINS).long().clamp(max=self.BINS - 1)
        right = (prediction == label)[valid].double()
        for row, weights in zip(self.bins, (None, right, confidence[valid].double()), strict=True):
            row += torch.bincount(bins, weights, minlength=self.BINS)
        pair = label[valid].long() * self.classes + prediction[valid].long()
        self.confusion += torch.bincount(pair, minlength=self.classes**2).view(self.classes, self.classes)

        found, true = self._edges(prediction, valid), self._edges(label, valid)
        for count, map_, edge, other, other_edge in (
            (self.predicted, prediction, found, label, true),
            (self.labelled, label, true, prediction, found),
        ):
            classes = map_[edge].long()
            matched = (self._near(other.long(), other_edge)[edge] >> classes) & 1
            count[0] += torch.bincount(classes, matched.double(), minlength=self.classes)
            count[1] += torch.bincount(classes, minlength=self.classes)

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

    def calibration_error(self) -> float:
        """Mean distance of accuracy and confidence, weighed by a bin's pixels."""
        pixels, right, confidence = self.bins
        return float((right - confidence).abs().sum() / pixels.sum())

    def summary(self) -> dict:
        """Means over the classes that occur, and the scores per class, as JSON types, shares of 1."""
        iou, boundary = self.iou(), self.boundary_f()
        return {
            "miou": float(iou.nanmean()),
            "boundary_f": float(boundary.nanmean()),
            "pixel_accuracy": self.pixel_accuracy(),
            "calibration_error": self.calibration_error(),
            "iou_per_class": _finite(iou),
            "boundary_f_per_class": _finite(boundary),
        }

    def _edges(self, map_: Tensor, valid: Tensor) -> Tensor:
        """bool (N, H, W): pixels with a valid 4-neighbour of another class."""
        edge = torch.zeros_like(valid)
        for axis in (1, 2):
            here, there = (map_.narrow(axis, start, map_.shape[axis] - 1) for start in (0, 1))
            both = (valid.narrow(axis, start, map_.shape[axis] - 1) for start in (0, 1))
            change = (here != there) & next(both) & next(both)
            edge.narrow(axis, 0, change.shape[axis]).logical_or_(change)
            edge.narrow(axis, 1, change.shape[axis]).logical_or_(change)
        return edge

    def _near(self, map_: Tensor, edge: Tensor) -> Tensor:
        """int64 (N, H, W): a bit for each class that has an edge pixel within the tolerance."""
        bits = torch.where(edge, torch.ones_like(map_) << map_, 0)
        for axis in (1, 2):
            spread = bits.clone()
            for shift in range(1, min(self.tolerance, bits.shape[axis] - 1) + 1):
                length = bits.shape[axis] - shift
                spread.narrow(axis, 0, length).bitwise_or_(bits.narrow(axis, shift, length))
                spread.narrow(axis, shift, length).bitwise_or_(bits.narrow(axis, 0, length))
            bits = spread
        return bits


def _finite(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
