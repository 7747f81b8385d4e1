"""Forward passes over labelled sentences: losses, logits, and what they cost."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynplan.policies import FixedPath
from dynplan.training.data import EncodedDataset, Task
from dynplan.training.losses import sample_losses
from dynplan.training.metrics import task_metrics
from dynplan.training.progress import steps


@dataclass(frozen=True)
class Prediction:
    """losses: float ``(N,)``; logits ``(N, C)``; labels ``(N,)``; plan: bool ``(N, L)``; lengths: tokens,
    ``(N,)``.
    """

    losses: Tensor
    logits: np.ndarray
    labels: np.ndarray
    plan: Tensor
    lengths: Tensor

    def quality(self, task: Task) -> Tensor:
        """How good each sample's prediction is, float ``(N,)``: what a planner should maximise.

        For classes the mean of right or wrong and of the label's probability: the first is what is scored,
        the second says how nearly. (The loss alone prefers a path that is wrong by a little on many samples.)
        For regression minus the squared error.
        """
        if task.kind == "regression":
            return -self.losses
        right = torch.from_numpy(self.logits.argmax(-1) == self.labels)
        return (right.to(self.losses) + self.losses.neg().exp()) / 2

    @property
    def sample_layers(self) -> float:
        """Share of sample-layers that were run."""
        return float(self.plan.float().mean())

    @property
    def token_layers(self) -> float:
        """Share of token-layers that were run: what the time is nearly proportional to."""
        return float((self.plan.sum(1) * self.lengths).sum() / (self.plan.shape[1] * self.lengths.sum()))

    def figures(self, task: Task) -> dict[str, float]:
        return task_metrics(task, self.logits, self.labels)


def make_batches(dataset: EncodedDataset, tokenizer, batch_size: int, by_length: bool = False) -> list[dict]:
    """Padded batches as the model's keyword arguments, with labels; in file order unless ``by_length``."""
    order = range(len(dataset))
    if by_length:
        order = sorted(order, key=lambda i: -dataset.lengths[i])
    rows = [dataset[i] for i in order]
    return [
        dict(tokenizer.pad(rows[start : start + batch_size], return_tensors="pt"))
        for start in range(0, len(rows), batch_size)
    ]


def beside(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[dict], task: Task) -> Prediction:
    """Run ``batches`` through ``model``, swapped or not, in eval mode under its current policy and budget."""
    training, control = model.training, getattr(model, "dynplan", None)
    model.eval()
    parts: dict[str, list[Tensor]] = {key: [] for key in ("losses", "logits", "labels", "plan", "lengths")}
    for batch in batches:
        batch = beside(model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits
        parts["losses"].append(sample_losses(task, logits, batch["labels"]))
        parts["logits"].append(logits.float())
        parts["labels"].append(batch["labels"])
        parts["lengths"].append(inputs["attention_mask"].sum(1))
        all_kept = torch.ones(len(logits), model.config.num_hidden_layers, dtype=torch.bool)
        parts["plan"].append(control.last_plan.cpu() if control else all_kept)
    model.train(training)
    joined = {key: torch.cat(values).cpu() for key, values in parts.items()}
    return Prediction(
        joined["losses"],
        joined["logits"].numpy(),
        joined["labels"].numpy(),
        joined["plan"],
        joined["lengths"],
    )


def path_qualities(
    model: nn.Module, batches: list[dict], task: Task, paths: Tensor, progress: bool = False
) -> Tensor:
    """Quality of every sample on every path, float ``(N, P)``; ``paths`` is bool ``(P, L)``. The policy is
    restored.
    """
    control = model.dynplan
    policy, budget = control.policy, control.budget
    control.budget = None
    columns = []
    for path in steps(paths, "qualities of paths", progress):
        control.policy = FixedPath(path)
        columns.append(predict(model, batches, task).quality(task))
    control.policy, control.budget = policy, budget
    return torch.stack(columns, 1)
