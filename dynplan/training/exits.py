"""Training exits by deep supervision, and what they say of rows.

One forward on the full path trains everything: its loss, and at each exit the loss and the divergence from
the full path's answer. What DPBERT (arXiv 2308.00108) does is not published; weights and schedule are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynplan.nn.exits import Exits
from dynplan.policies import KeepAll
from dynplan.training.data import Task
from dynplan.training.losses import path_divergence, sample_losses
from dynplan.training.metrics import task_metrics
from dynplan.training.predict import beside, make_batches
from dynplan.training.ranks import figures_from_first, from_first
from dynplan.training.trainer import PlainTrainer

_SHARES = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6)


def default_depths(num_layers: int) -> tuple[int, ...]:
    """Where exits are worth having: 2, 3, 4, 6, 8 and 10 of 12 layers; a model of one layer has none."""
    depths = {max(1, round(share * num_layers)) for share in _SHARES}
    return tuple(sorted(depth for depth in depths if depth < num_layers))


class ExitLearner(nn.Module):
    """What Trainer trains and saves: the swapped model and its exits."""

    def __init__(self, model: nn.Module, exits: Exits):
        super().__init__()
        self.model, self.exits = model, exits

    def forward(self, loss: Callable[..., Tensor], *arguments) -> Tensor:
        """The loss, computed where several processes see every parameter that is used."""
        return loss(*arguments)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of each sample's tokens, ``(B, H)``, of ``(B, S, H)``; what :func:`dynplan.nn.planner.pool` gives
    for packed rows."""
    weights = (mask != 0).to(states.dtype).unsqueeze(2)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


class ExitTrainer(PlainTrainer):
    """Fine-tunes a swapped model together with its exits.

    loss = L(full) + sum over exits of w_d (L(exit) + ``distill`` * divergence(exit from full)), where w_d is
    half of the exit's share of the layers. What the exits say of their own answers learns beside, without a
    gradient into the encoder. Checkpoints are ranked by the mean of the full path's score and that of the
    exits' mean.
    """

    stage = "exits"

    def __init__(
        self, learner: ExitLearner, *args, distill: float = 1.0, exit_learning_rate: float = 1e-3, **kwargs
    ):
        super().__init__(learner, *args, **kwargs)
        self.distill, self.exit_learning_rate = distill, exit_learning_rate
        self.eval_batches = make_batches(self.eval_dataset, self.processing_class, 32, by_length=True)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                groups.setdefault((name in decayed, name.startswith("exits.")), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            rates = {True: self.exit_learning_rate, False: self.args.learning_rate}
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay * decay,
                        "lr": rates[of_exits],
                    }
                    for (decay, of_exits), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return model(self._loss, self.accelerator.unwrap_model(model), inputs, labels)

    def _loss(self, learner: ExitLearner, inputs: dict, labels: Tensor) -> Tensor:
        control, exits = learner.model.dynplan, learner.exits
        control.policy = KeepAll()
        output = learner.model(**inputs, output_hidden_states=True)
        with torch.autocast(labels.device.type, enabled=False):  # bf16 is the encoder's, exits are small
            logits = output.logits.float()
            loss = sample_losses(self.task, logits, labels)
            for index, depth in enumerate(exits.depths):
                pooled = masked_mean(output.hidden_states[depth].float(), inputs["attention_mask"])
                answers = control.answer(exits(index, pooled))
                mine = sample_losses(self.task, answers, labels)
                apart = path_divergence(self.task, answers, logits)
                loss = loss + 0.5 * depth / exits.num_layers * (mine + self.distill * apart)
                loss = loss + _of_itself(exits, index, pooled.detach(), answers.detach(), labels)
        return loss.mean()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        learner = self.accelerator.unwrap_model(self.model)
        answers = exit_answers(learner.model, learner.exits, self.eval_batches, self.task)
        scores = [task_metrics(self.task, answers.logits[:, i].numpy(), answers.labels.numpy())["score"]
                  for i in range(answers.logits.shape[1])]  # fmt: skip
        exits = sum(scores[:-1]) / len(scores[:-1])
        figures = {
            "full_score": scores[-1], "exit_score": exits, "score": (scores[-1] + exits) / 2
        }  # fmt: skip
        figures = figures_from_first(
            {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        )
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


def _of_itself(exits: Exits, index: int, pooled: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
    """Loss of what an exit says of its own answers, ``(B,)``."""
    if exits.errors is not None:
        error = (answers[:, 0] - labels).square()
        said = -exits.sureness(index, answers, pooled)
        return F.mse_loss(said, (error + 1e-3).log(), reduction="none")
    right = (answers.argmax(1) == labels).float()
    return F.binary_cross_entropy_with_logits(
        exits.certainty[index](pooled).squeeze(1), right, reduction="none"
    )


@dataclass(frozen=True)
class ExitAnswers:
    """What every exit and the full path say of some rows.

    logits: float ``(N, R + 1, C)``, the full path's last; pooled: ``(N, R, H)``; labels ``(N,)``; lengths:
    tokens, ``(N,)``.
    """

    logits: Tensor
    pooled: Tensor
    labels: Tensor
    lengths: Tensor

    def from_first(self) -> ExitAnswers:
        """As the first process has them."""
        return ExitAnswers(*map(from_first, (self.logits, self.pooled, self.labels, self.lengths)))

    def qualities(self, task: Task) -> Tensor:
        """How good each answer is, ``(N, R + 1)``: as :meth:`dynplan.training.predict.Prediction.quality`."""
        rungs = []
        for logits in self.logits.unbind(1):
            losses = sample_losses(task, logits, self.labels)
            if task.kind == "regression":
                rungs.append(-losses)
            else:
                rungs.append(((logits.argmax(1) == self.labels) + losses.neg().exp()) / 2)
        return torch.stack(rungs, 1)


@torch.no_grad()
def exit_answers(model: nn.Module, exits: Exits, batches: list[dict], task: Task) -> ExitAnswers:
    """Run ``batches`` once on the full path and read it at every exit. The policy is restored."""
    control, training = model.dynplan, model.training
    policy, budget = control.policy, control.budget
    control.policy, control.budget = KeepAll(), None
    model.eval()
    parts = []
    for batch in batches:
        batch = beside(model, batch)
        labels = batch["labels"]
        output = model(**{key: value for key, value in batch.items() if key != "labels"},
                       output_hidden_states=True)  # fmt: skip
        mask = batch["attention_mask"]
        pooled = [masked_mean(output.hidden_states[depth], mask).float() for depth in exits.depths]
        logits = [control.answer(exits(index, mean)).float() for index, mean in enumerate(pooled)]
        logits = torch.stack((*logits, output.logits.float()), 1)
        parts.append([part.cpu() for part in (logits, torch.stack(pooled, 1), labels, mask.sum(1))])
    model.train(training)
    control.policy, control.budget = policy, budget
    return ExitAnswers(*map(torch.cat, zip(*parts, strict=True)))
