"""The GLUE figures, from scikit-learn and SciPy."""

import warnings

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dynplan.training.data import Task


def task_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Every figure that fits the task, and ``score``, the one that ranks.

    logits: (N, classes), or (N,) or (N, 1) for regression; labels: (N,). Classification gives accuracy,
    Matthews correlation and F1 (of class 1 with two classes, the macro mean otherwise); regression Pearson
    and Spearman correlation. A correlation of constant predictions, or of one, is undefined and counts as 0.
    """
    if task.kind == "regression":
        predictions = np.asarray(logits, dtype=np.float64).reshape(len(labels))
        figures = {
            "pearson": _correlation(pearsonr, predictions, labels),
            "spearman": _correlation(spearmanr, predictions, labels),
        }
    else:
        predictions = np.asarray(logits).argmax(axis=-1)
        average = "binary" if task.num_labels == 2 else "macro"
        figures = {
            "accuracy": accuracy_score(labels, predictions),
            "f1": f1_score(labels, predictions, average=average, zero_division=0),
            "matthews": matthews_corrcoef(labels, predictions),
        }
    figures = {name: float(value) for name, value in figures.items()}
    figures["score"] = float(np.mean([figures[name] for name in task.metric.split("+")]))
    return figures


def _correlation(function, predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = function(predictions, labels)[0]
    return float(value) if np.isfinite(value) else 0.0
