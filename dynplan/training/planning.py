"""Learning a planner for a robust encoder whose own weights stay as they are.

Three objectives; all are our own choice among what the literature on layer skipping does:

- ``gates``: straight-through gates, the plan forward, the gradient of its logistic relaxation backward, plus
  a cost term.
- ``reward``: score-function gradient from several plans per sample at the budget; reward = -loss,
  leave-one-out baseline.
- ``values``: a table of good paths is chosen on training data, the quality of every path on every training
  row is measured once, and the planner learns to predict them from a row's embeddings.

``reward`` and ``values`` never differentiate through the encoder, so their forwards run on the fused kernels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynplan.budget import within_budget
from dynplan.policies import FixedPath, PlannerPolicy, PlanRequest, Policy
from dynplan.training.losses import path_divergence, sample_losses
from dynplan.training.predict import beside, make_batches, predict
from dynplan.training.ranks import draw_share, figures_from_first
from dynplan.training.trainer import PlainTrainer

OBJECTIVES = ("gates", "reward", "values")


class PlannerLearner(nn.Module):
    """What Trainer trains and saves: the planner. The encoder stands outside the module tree, frozen, in eval
    mode.
    """

    def __init__(self, model: nn.Module, planner: nn.Module):
        super().__init__()
        self.planner = planner
        self._encoder = (model.eval().requires_grad_(False),)

    @property
    def encoder(self) -> nn.Module:
        return self._encoder[0]

    def forward(self, loss: Callable[..., Tensor], *arguments) -> Tensor:
        """The loss, computed where several processes see that gradients are wanted."""
        return loss(*arguments)


class _Look(Policy):
    """Runs no layer and keeps the request: how a planner's input is had outside a planned forward."""

    def plan(self, request: PlanRequest) -> Tensor:
        self.request = request
        return torch.zeros(request.batch_size, request.num_layers, dtype=torch.bool, device=request.device)


class _Follow(Policy):
    """Keeps what a stepwise planner scores at least 0, as its training does, and collects the scores."""

    stepwise = True

    def __init__(self, planner: nn.Module, budget: float):
        self.planner, self.budget, self.scores = planner, budget, []

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        self.scores.append(self.planner(layer, hidden, request.cu_seqlens, self.budget))
        return self.scores[-1] >= 0


def look(encoder: nn.Module, inputs: dict) -> PlanRequest:
    """The request a policy would get for ``inputs``; costs the embeddings only."""
    policy = _Look()
    encoder.dynplan.policy = policy
    with torch.no_grad():
        encoder(**inputs)
    return policy.request


@torch.no_grad()
def calibrate(encoder: nn.Module, planner: nn.Module, batches: list[dict], budgets) -> None:
    """Store in the planner what ties a budget to its scores, measured on training batches."""
    inputs = [
        beside(encoder, {key: value for key, value in batch.items() if key != "labels"}) for batch in batches
    ]
    if planner.stepwise:
        followers = [_Follow(planner, budget) for budget in budgets]
        for follower in followers:
            encoder.dynplan.policy = follower
            for batch in inputs:
                encoder(**batch)
        planner.calibrate(torch.cat([score for follower in followers for score in follower.scores]))
    elif planner.paths is not None:
        requests = [look(encoder, batch) for batch in inputs]
        planner.calibrate(torch.cat([planner(r.hidden, r.cu_seqlens, 1.0) for r in requests]))


class PlannerTrainer(PlainTrainer):
    """Trains the planner of a swapped model with one of :data:`OBJECTIVES`; the budget is drawn anew for
    every batch.

    Half of the batches use one of ``budgets``, the others a budget uniform between 0.4 and 0.9. Checkpoints
    are ranked by ``quality``: the mean quality on the evaluation rows over ``budgets``. ``values`` expects
    each training row to hold ``path_qualities``, one for each path of the planner's table.
    """

    stage = "planner"

    def __init__(
        self,
        learner: PlannerLearner,
        *args,
        objective: str,
        budgets: tuple[float, ...],
        plans: int = 4,
        cost: float = 10.0,
        distill: float = 1.0,
        **kwargs,
    ):
        if objective not in OBJECTIVES:
            raise ValueError(f"planner objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if objective != "gates" and learner.planner.stepwise:
            raise ValueError(f"planner objective: expected gates for a stepwise planner, got {objective!r}")
        super().__init__(learner, *args, **kwargs)
        learner.encoder.to(self.args.device)  # no submodule of the learner: it stays where it was otherwise
        self.budgets, self.plans, self.cost, self.distill = budgets, plans, cost, distill
        self.objective = objective
        tokenizer = self.processing_class
        self.train_batches = [
            {key: value for key, value in batch.items() if key != "path_qualities"}
            for batch in make_batches(self.train_dataset, tokenizer, 32)[:16]
        ]
        self.eval_batches = make_batches(self.eval_dataset, tokenizer, 32)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, measured = inputs.pop("labels"), inputs.pop("path_qualities", None)
        planner, encoder = self.model.planner, self.model.encoder
        if self.objective == "values":
            return model(self._values, planner, look(encoder, inputs), measured)
        step = self._gates if self.objective == "gates" else self._reward
        return model(step, encoder, planner, inputs, labels, self._draw_budget())

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        encoder, planner = self.model.encoder, self.model.planner
        calibrate(encoder, planner, self.train_batches, self.budgets)
        figures = {}
        for budget in self.budgets:
            encoder.dynplan.policy = PlannerPolicy(planner, budget)
            prediction = predict(encoder, self.eval_batches, self.task)
            figures[f"{metric_key_prefix}_quality_{budget:g}"] = float(prediction.quality(self.task).mean())
        figures[f"{metric_key_prefix}_quality"] = sum(figures.values()) / len(figures)
        figures = figures_from_first(figures)
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _draw_budget(self) -> float:
        coin, place = torch.rand(2).tolist()
        return self.budgets[int(place * len(self.budgets))] if coin < 0.5 else 0.4 + 0.5 * place

    def _loss(self, logits: Tensor, labels: Tensor, full: Tensor) -> Tensor:
        return sample_losses(self.task, logits, labels) + self.distill * path_divergence(
            self.task, logits, full
        )

    @torch.no_grad()
    def _full_logits(self, encoder, inputs) -> Tensor:
        encoder.dynplan.policy = FixedPath([True] * encoder.dynplan.num_layers)
        return encoder(**inputs).logits

    def _gates(self, encoder, planner, inputs, labels, budget: float) -> Tensor:
        full, shares = self._full_logits(encoder, inputs), []

        def straight_through(scores: Tensor, hard: Tensor) -> Tensor:
            soft = scores.sigmoid()
            shares.append(soft.mean())
            return hard.to(soft.dtype) + soft - soft.detach()

        def upfront(request: PlanRequest) -> Tensor:
            scores = planner(request.hidden, request.cu_seqlens, budget)
            return straight_through(scores, within_budget(scores, request.cu_seqlens, budget))

        def stepwise(layer: int, request: PlanRequest, hidden: Tensor) -> Tensor:
            scores = planner(layer, hidden, request.cu_seqlens, budget)
            return straight_through(scores, scores >= 0)

        stepwise.stepwise = True
        encoder.dynplan.gates = stepwise if planner.stepwise else upfront
        loss = self._loss(encoder(**inputs).logits, labels, full).mean()
        return loss + self.cost * (torch.stack(shares).mean() - budget) ** 2

    def _reward(self, encoder, planner, inputs, labels, budget: float) -> Tensor:
        full, request = self._full_logits(encoder, inputs), look(encoder, inputs)
        scores = planner(request.hidden, request.cu_seqlens, budget)
        logs, keeps = [], []
        for _ in range(self.plans):
            noise = draw_share(lambda rows: torch.rand(rows, scores.shape[1]), len(scores)).to(scores)
            noisy = scores.detach() + torch.logit(noise, eps=1e-6)
            keep = within_budget(noisy, request.cu_seqlens, budget)
            # Given the cut's level, logistic noise makes every decision an independent Bernoulli draw.
            inside, outside = (
                noisy.masked_fill(~keep, torch.inf).min(),
                noisy.masked_fill(keep, -torch.inf).max(),
            )
            level = torch.stack((inside, outside)).clamp(-20, 20).mean()
            logs.append(F.logsigmoid((scores - level) * (keep * 2.0 - 1.0)).sum(1))
            keeps.append(keep)
        with torch.no_grad():
            encoder.dynplan.policy = FixedPath(torch.cat(keeps))
            logits = encoder(**{key: torch.cat([value] * self.plans) for key, value in inputs.items()}).logits
            reward = -self._loss(logits, labels.repeat(self.plans), full.repeat(self.plans, 1)).view(
                self.plans, -1
            )
            sizes = torch.stack(keeps).sum(2).to(reward.dtype)
            others = self.plans / (self.plans - 1)  # leave-one-out mean = plain mean, scaled
            advantage, extra = (reward - reward.mean(0)) * others, (sizes - sizes.mean(0)) * others
            # What a layer is worth on average in this batch is no news about a sample: only gains above it
            # count.
            price = ((advantage * extra).sum() / extra.square().sum().clamp_min(1e-6)).clamp_min(0)
            advantage = advantage - price * extra
            advantage = advantage / advantage.std().clamp_min(1e-4)
        return -(advantage * torch.stack(logs)).mean()

    def _values(self, planner, request: PlanRequest, measured: Tensor) -> Tensor:
        quality = planner(request.hidden, request.cu_seqlens, 1.0)
        return F.mse_loss(quality, measured.to(quality))
