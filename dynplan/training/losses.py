"""Losses per sample, and the paths that robust fine-tuning draws.

The recipe is in the manner of DPBERT (arXiv 2308.00108) only in its aim, a planner on a fine-tuned encoder
whose layers can be bypassed. The paper publishes neither losses nor schedules; everything here is our own
choice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dynplan.training.data import Task


def sample_losses(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each sample, float32 ``(B,)``: cross-entropy, or the squared error for regression.

    logits: ``(B, classes)``, or ``(B, 1)`` for regression; labels: ``(B,)``.
    """
    if task.kind == "regression":
        return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="none")
    return F.cross_entropy(logits.float(), labels, reduction="none")


def path_divergence(task: Task, path_logits: Tensor, full_logits: Tensor) -> Tensor:
    """How far each path's prediction is from the full path's, float32 ``(B,)``; the full path is a constant
    target.

    Kullback-Leibler divergence of the path's distribution from the full path's (nats), or the squared
    difference for regression.
    """
    target = full_logits.detach().float()
    if task.kind == "regression":
        return F.mse_loss(path_logits.float().squeeze(-1), target.squeeze(-1), reduction="none")
    return F.kl_div(
        F.log_softmax(path_logits.float(), -1), F.log_softmax(target, -1), reduction="none", log_target=True
    ).sum(-1)


def path_sizes(num_layers: int, min_share: float, max_share: float) -> tuple[int, int]:
    """Least and largest number of layers a drawn path keeps: whole layers inside the share's bounds, at least
    one.
    """
    low = max(1, math.ceil(min_share * num_layers - 1e-6))
    return low, max(low, math.floor(max_share * num_layers + 1e-6))


def draw_paths(batch_size: int, num_layers: int, sizes: tuple[int, int]) -> Tensor:
    """Random paths, bool ``(B, L)``: each sample's number of layers uniform in ``sizes``, then layers at
    random.

    Drawn from torch's global generator, whose state Trainer's checkpoints restore.
    """
    count = torch.randint(sizes[0], sizes[1] + 1, (batch_size, 1))
    return torch.rand(batch_size, num_layers).argsort(1).argsort(1) < count
