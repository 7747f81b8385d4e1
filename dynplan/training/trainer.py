"""Ordinary and robust fine-tuning as thin subclasses of Hugging Face's Trainer."""

import json
import math
from pathlib import Path

import torch
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dynplan.errors import InputError
from dynplan.files import write_whole, writing
from dynplan.policies import FixedPath, KeepAll, RandomPath
from dynplan.training.checkpoints import BestCheckpoint, WholeCheckpoints
from dynplan.training.data import EncodedDataset, LengthGroupedSampler, Task
from dynplan.training.losses import draw_paths, path_divergence, path_sizes, sample_losses
from dynplan.training.metrics import task_metrics
from dynplan.training.predict import make_batches, predict
from dynplan.training.ranks import draw_share, figures_from_first


class JsonLinesLog(TrainerCallback):
    """Writes every logged figure to ``path``: one JSON object a line with the stage, the step and the
    figures.

    A stage that starts again, from its beginning or from a checkpoint, first drops its lines from beyond that
    step.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if self._stays(line, state.global_step)]
            with writing(self.path):
                write_whole(self.path, "".join(line + "\n" for line in kept))

    def _stays(self, line: str, step: int) -> bool:
        try:
            figures = json.loads(line)
        except ValueError:  # it was being written when the run was killed
            return False
        return figures["stage"] != self.stage or figures["step"] <= step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            figures = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **figures}) + "\n")


class StopWhenDiverged(TrainerCallback):
    """Weights that became NaN stay so: nothing that is trained after that is of use."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss", "train_loss"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise InputError(
                    f"{self.stage} stage: expected a finite loss, got {logs[name]} at step "
                    f"{state.global_step}; try a lower learning rate"
                )


def training_arguments(
    output_dir: Path,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    bf16: bool = False,
    **overrides,
) -> TrainingArguments:
    """Settings shared by all stages: evaluate and save each epoch, take the best checkpoint by ``score`` at
    the end.
    """
    settings = dict(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        logging_steps=20,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level_replica="passive",  # as quiet as the first process
        seed=seed,
        data_seed=seed,
    )
    return TrainingArguments(**{**settings, **overrides})


class PlainTrainer(WholeCheckpoints, Trainer):
    """Ordinary fine-tuning: the model's own loss, batches of like length, the task's figures at each
    evaluation.

    Every figure is also appended to ``metrics.jsonl`` beside the stage's output folder.
    """

    stage = "plain"

    def __init__(
        self,
        model,
        args: TrainingArguments,
        task: Task,
        tokenizer,
        train: EncodedDataset,
        evaluation: EncodedDataset | None,
        callbacks=(),
    ):
        self.task = task
        log = JsonLinesLog(Path(args.output_dir).parent / "metrics.jsonl", self.stage)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[StopWhenDiverged(self.stage), log, BestCheckpoint(), *callbacks],
            compute_metrics=self._figures,
        )
        self.remove_callback(PrinterCallback)  # dictionaries on standard output

    def _figures(self, output) -> dict[str, float]:
        logits = output.predictions
        return task_metrics(self.task, logits[0] if isinstance(logits, tuple) else logits, output.label_ids)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # Of all processes together: each takes its part of a batch of like lengths.
        batch_size = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(dataset.lengths, batch_size, self.args.seed)


class StudentTrainer(PlainTrainer):
    """Ordinary fine-tuning with a teacher's answers as targets beside the labels (Hinton et al., arXiv
    1503.02531): loss = L(labels) + ``distill`` * divergence(from the teacher). Training items hold
    ``teacher``, its logits.
    """

    def __init__(self, *args, distill: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.distill = distill

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, target = inputs.pop("labels"), inputs.pop("teacher")
        logits = model(**inputs).logits
        apart = path_divergence(self.task, logits, target)
        return (sample_losses(self.task, logits, labels) + self.distill * apart).mean()


class RobustTrainer(PlainTrainer):
    """Fine-tunes a swapped model so that it stands layer bypass.

    Each batch runs twice in one forward, once on the full path and once with a random path per sample (share
    of layers kept uniform in ``shares``); loss = L(full) + L(path) + ``distill`` * divergence(path from
    full). Checkpoints are ranked by the mean of the full path's score and that of random paths at the middle
    of ``shares``.
    """

    stage = "robust"

    def __init__(self, *args, shares: tuple[float, float] = (0.4, 0.9), distill: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.shares, self.distill = shares, distill

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        size, control = len(labels), self.model.dynplan
        sizes = path_sizes(control.num_layers, *self.shares)
        paths = draw_share(lambda rows: draw_paths(rows, control.num_layers, sizes), size)
        keep = torch.cat((torch.ones_like(paths), paths)).to(labels.device)
        control.policy = FixedPath(keep)
        logits = model(**{key: torch.cat((value, value)) for key, value in inputs.items()}).logits
        full, path = logits[:size], logits[size:]
        loss = sample_losses(self.task, full, labels) + sample_losses(self.task, path, labels)
        return (loss + self.distill * path_divergence(self.task, path, full)).mean()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        control = self.model.dynplan
        control.policy = KeepAll()
        figures = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        control.policy = RandomPath(sum(self.shares) / 2, seed=self.args.seed)
        # Whole on every process: a batch's paths depend on what else is in it, and on those drawn before.
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = make_batches(dataset, self.processing_class, self.args.eval_batch_size)
        on_paths = predict(self.model, batches, self.task).figures(self.task)
        on_paths = figures_from_first(
            {f"{metric_key_prefix}_path_{name}": value for name, value in on_paths.items()}
        )
        self.log(on_paths)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, on_paths)
        control.policy = KeepAll()
        score = f"{metric_key_prefix}_score"
        figures[f"{metric_key_prefix}_full_score"] = figures[score]
        figures[score] = (figures[score] + on_paths[f"{metric_key_prefix}_path_score"]) / 2
        return {**figures, **on_paths}
