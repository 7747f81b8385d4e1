"""The whole recipe, stage by stage: plain, then exits; or plain, robust, static, planner. Each stage leaves a
folder that a resumed run reuses.

What DPBERT (arXiv 2308.00108) does between "fine-tune" and "plan" is not published; stages, losses and
schedules here are ours. Only training rows are used: a slice of them is held out of fine-tuning to rank
checkpoints, to find the best fixed paths, to choose among exits and to stop the planner.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

import dynplan
from dynplan.budget import whole_layers
from dynplan.errors import InputError, WriteError
from dynplan.files import drop_unfinished, fresh_folder, settle_files, settle_folder, writing
from dynplan.loading import load_tokenizer
from dynplan.nn import Exits, StepwisePlanner, UpfrontPlanner
from dynplan.policies import KeepAll, PlannerPolicy, Policy, StaticPath
from dynplan.search import search_static_path
from dynplan.training.calibration import calibrate
from dynplan.training.checkpoints import newest_checkpoint
from dynplan.training.data import EncodedDataset, Task, describe_task, encode_rows, infer_task, split_rows
from dynplan.training.exits import ExitLearner, ExitTrainer, default_depths, exit_answers
from dynplan.training.menu import candidate_paths, choose_menu
from dynplan.training.models import check_tokens, load_classifier
from dynplan.training.planning import PlannerLearner, PlannerTrainer
from dynplan.training.predict import make_batches, path_qualities, predict
from dynplan.training.progress import StageProgress, say, steps
from dynplan.training.ranks import from_first, processes, share_of_batch
from dynplan.training.record import (
    RECIPE,
    RIVALS,
    STATIC,
    check_output,
    check_same_run,
    describe_run,
    read_static,
    record_run,
    write_rivals,
    write_static,
)
from dynplan.training.rivals import rivals
from dynplan.training.settings import Recipe
from dynplan.training.trainer import PlainTrainer, RobustTrainer, StudentTrainer, training_arguments

_DONE = "stage.json"  # in the folder of a finished stage


def finetune(
    model: str | Path,
    rows: list[dict],
    output: str | Path,
    task: str = "auto",
    recipe: Recipe | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks=(),
    teacher: str | Path | None = None,
) -> nn.Module:
    """Fine-tune an encoder and learn its planner.

    Whenever a run is interrupted, be it killed in the middle of a save, ``resume`` leads to the same result.
    In the manner of DPBERT (arXiv 2308.00108), whose recipe is not published; docs/training.md says what is
    our choice.

    Args:
        model: folder of a Hugging Face encoder with its tokenizer.
        rows: of :func:`read_rows`.
        output: folder that receives the model with planner and policy (``dynplan.from_pretrained`` reads it),
            its tokenizer, ``recipe.json``, ``metrics.jsonl`` and the stages' own folders.
        task: its name, see :func:`infer_task`.
        recipe: every setting; None: the default of each.
        resume: take finished stages from ``output`` and go on from the last checkpoint of an interrupted one.
        progress: whether bars and lines are shown.
        callbacks (Sequence[transformers.TrainerCallback]): for Hugging Face's ``Trainer``.
        teacher: folder of a model fine-tuned for the same task, whose answers are targets beside the labels;
            with ``planner="none"`` only.

    Returns:
        The swapped model.

    Raises:
        InputError: a folder, rows or settings that cannot be used, before anything is written; training that
            diverges.
    """
    run = _Run(model, rows, Path(output), task, recipe or Recipe(), resume, progress, callbacks, teacher)
    try:
        return run.run()
    except OSError as error:  # Trainer makes folders of its own
        raise WriteError(f"{output}: expected to write it, got {error}") from error


class _Run:
    def __init__(self, model, rows, output, task, recipe, resume, progress, callbacks, teacher):
        self.ranks = processes()
        self.recipe, self.callbacks = recipe, callbacks
        self.progress = progress = progress and self.ranks.is_main_process
        share_of_batch(recipe.batch_size)
        self.source, self.output = Path(model), check_output(output, resume)
        # Nothing is trained before recipe.json is there.
        self.resume = resume and (self.output / RECIPE).exists()
        self.task: Task = infer_task(rows, task)
        self.teacher = teacher
        if teacher is not None and recipe.planner != "none":
            raise InputError(f"finetune: expected a teacher with planner none, got {recipe.planner}")
        described = describe_run(self.task, recipe, self.source, rows, self.ranks.num_processes, teacher)
        if self.resume:
            check_same_run(self.output, described)
        if not (self.source / "config.json").is_file():
            raise InputError(f"model: expected a folder with a Hugging Face model, got {model}")
        fit, held = split_rows(rows, recipe.holdout, recipe.seed)
        if not held or not fit:
            raise InputError(
                f"finetune: expected rows enough to hold out {recipe.holdout:.0%} of them, got {len(rows)}"
            )
        self.tokenizer = load_tokenizer(self.source)
        self.fit, self.held = self._encode(fit), self._encode(held)
        config = self._load(self.source).config
        for part in (self.fit, self.held):
            check_tokens(part, self.tokenizer, config)
        epochs = {"plain": recipe.plain_epochs}
        if recipe.planner == "exits":
            epochs["exits"] = recipe.exit_epochs
        elif recipe.planner != "none":
            epochs |= {"robust": recipe.robust_epochs, "static": 1, "planner": recipe.planner_epochs}
        self.stages = [stage for stage, count in epochs.items() if count > 0]
        say(describe_task(self.task, rows), progress)
        self.ranks.wait_for_everyone()  # all have looked at the folder
        if self.ranks.is_main_process:
            drop_unfinished(self.output, (RECIPE, STATIC, RIVALS, "metrics.jsonl"))
            if not self.resume:
                record_run(self.output, described)

    def _encode(self, rows: list[dict]) -> EncodedDataset:
        return encode_rows(rows, self.task, self.tokenizer, self.recipe.max_length)

    def _title(self, stage: str) -> str:
        return f"stage {self.stages.index(stage) + 1} of {len(self.stages)}, {stage}"

    def run(self) -> nn.Module:
        folder = self.source
        if self.recipe.plain_epochs > 0:
            kind = PlainTrainer if self.teacher is None else StudentTrainer
            folder = self._fit_encoder(folder, kind, self.recipe.plain_epochs, self.recipe.learning_rate)
        if self.recipe.planner == "exits":
            model = self._fit_exits(folder)
            return self._finish(model, model.dynplan.policy)
        if self.recipe.planner == "none":
            return self._finish(self._load_swapped(folder), KeepAll())
        if self.recipe.robust_epochs > 0:
            rate = self.recipe.robust_learning_rate or self.recipe.learning_rate
            folder = self._fit_encoder(folder, RobustTrainer, self.recipe.robust_epochs, rate)
        model = self._load_swapped(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        static = self._search(model)
        planner = self._learn(model, static)
        return self._finish(model, PlannerPolicy(planner) if planner is not None else static)

    def _finish(self, model: nn.Module, policy: Policy) -> nn.Module:
        model.requires_grad_(True)
        model.dynplan.policy = policy
        if self.ranks.is_main_process:
            with writing(self.output):
                unfinished = self._save(model)
                # Without dynplan.json the folder is not taken for a finished one.
                settle_files(unfinished, self.output, last=["dynplan.json"])
        self.ranks.wait_for_everyone()
        return model

    def _save(self, model: nn.Module) -> Path:
        """Model and tokenizer in a folder under a name that nothing reads."""
        unfinished = fresh_folder(self.output / ".unfinished")
        model.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        return unfinished

    def _load(self, folder: Path) -> nn.Module:
        # A new head draws its weights from the global generator.
        set_seed(self.recipe.seed)
        return load_classifier(folder, self.task)

    def _load_swapped(self, folder: Path) -> nn.Module:
        return dynplan.swap(self._load(folder))

    def _checkpoints(self, stage: str) -> Path:
        return self.output / f"{stage}-checkpoints"

    def _arguments(self, stage: str, **settings):
        return training_arguments(self._checkpoints(stage), seed=self.recipe.seed, **settings)

    def _train(self, trainer, stage: str) -> None:
        folder = self._checkpoints(stage)
        if self.ranks.is_main_process:
            if not self.resume:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that is not this one
            drop_unfinished(folder, ())
        self.ranks.wait_for_everyone()
        shown = StageProgress(self._title(stage), self.progress)
        trainer.add_callback(shown)
        try:
            trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
        finally:
            shown.close()

    def _fit_encoder(self, source: Path, trainer_class, epochs: float, learning_rate: float) -> Path:
        stage = trainer_class.stage
        done = self.output / stage
        if self.resume and (done / _DONE).exists():
            say(f"{self._title(stage)}: taken from {done}", self.progress)
            return done
        model, rows = self._load(source), self.fit
        extra = {}
        if trainer_class is StudentTrainer:
            rows, extra = self._taught(), {"distill": self.recipe.distill}
        elif trainer_class is RobustTrainer:
            model = dynplan.swap(model)
            extra = {"shares": self.recipe.shares, "distill": self.recipe.distill}
        arguments = self._arguments(
            stage,
            epochs=epochs,
            batch_size=share_of_batch(self.recipe.batch_size),
            learning_rate=learning_rate,
            bf16=self.recipe.bf16,
        )
        trainer = trainer_class(
            model, arguments, self.task, self.tokenizer, rows, self.held, self.callbacks, **extra
        )
        self._train(trainer, stage)
        if trainer_class is RobustTrainer:
            model = dynplan.unswap(model)
        self._settle_stage(model, stage)
        return done

    def _taught(self) -> EncodedDataset:
        """The rows to fit, each with what the teacher answers."""
        say(f"{self._title('plain')}: the teacher's answers", self.progress)
        teacher = load_classifier(Path(self.teacher), self.task)
        teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        batches = make_batches(self.fit, self.tokenizer, 64)
        answers = from_first(torch.from_numpy(predict(teacher, batches, self.task).logits))
        return EncodedDataset(
            [{**item, "teacher": row} for item, row in zip(self.fit.items, answers.tolist(), strict=True)]
        )

    def _settle_stage(self, model: nn.Module, stage: str) -> None:
        """What a stage leaves in its folder, whole, on one process."""
        done = self.output / stage
        if self.ranks.is_main_process:
            with writing(done):
                unfinished = self._save(model)
                (unfinished / _DONE).write_text(json.dumps({"stage": stage}) + "\n", encoding="utf-8")
                settle_folder(unfinished, done)
        self.ranks.wait_for_everyone()

    def _fit_exits(self, source: Path) -> nn.Module:
        """The swapped model with its exits, trained and calibrated on the held-out rows."""
        done = self.output / "exits"
        if self.resume and (done / _DONE).exists():
            say(f"{self._title('exits')}: taken from {done}", self.progress)
            return dynplan.from_pretrained(done)
        model = self._load_swapped(source)
        layers = model.dynplan.num_layers
        depths = default_depths(layers)
        if not depths:
            raise InputError(f"finetune: expected a model of at least two layers for exits, got {layers}")
        exits = Exits(model.config.hidden_size, layers, depths, self.task.kind == "regression")
        arguments = self._arguments(
            "exits",
            epochs=self.recipe.exit_epochs,
            batch_size=share_of_batch(self.recipe.batch_size),
            learning_rate=self.recipe.learning_rate,
            bf16=self.recipe.bf16,
        )
        trainer = ExitTrainer(
            ExitLearner(model, exits),
            arguments,
            self.task,
            self.tokenizer,
            self.fit,
            self.held,
            self.callbacks,
            distill=self.recipe.distill,
            exit_learning_rate=self.recipe.exit_learning_rate,
        )
        self._train(trainer, "exits")
        held = make_batches(self.held, self.tokenizer, 64, by_length=True)
        answers = exit_answers(model.eval(), exits, held, self.task).from_first()
        model.dynplan.policy = calibrate(exits, answers, self.task)
        if self.ranks.is_main_process:
            write_rivals(self.output, rivals(exits, answers, self.task))
        self._settle_stage(model, "exits")
        return model

    def _search(self, model: nn.Module) -> StaticPath:
        if self.resume and (self.output / STATIC).exists():
            return read_static(self.output)
        say(f"{self._title('static')}: the best fixed subsets of layers", self.progress)
        layers = model.dynplan.num_layers
        sizes = {whole_layers(budget, layers) for budget in self.recipe.budgets} - {0, layers}
        sizes |= {size + 1 for size in sizes if size + 1 < layers}
        sizes = sizes or {1}
        most = sum(range(min(sizes) + 1, layers + 1)) + self.recipe.search_swaps * len(sizes)
        with steps(None, self._title("static"), self.progress, total=most) as bar:

            def cost(model: nn.Module, batches: list[dict]) -> float:
                # By what is scored, like the planner's table: by the loss alone, a path that predicts one
                # class with little confidence can win.
                bar.update()
                return -float(predict(model, batches, self.task).quality(self.task).mean())

            static = search_static_path(
                model,
                self._search_batches(),
                sizes,
                swaps=self.recipe.search_swaps,
                seed=self.recipe.seed,
                progress=False,
                cost=cost,
            )
        # All processes have searched, so that none waits for long; the first one's result counts.
        if self.ranks.is_main_process:
            write_static(self.output, static)
        self.ranks.wait_for_everyone()
        return read_static(self.output)

    def _search_batches(self) -> list[dict]:
        rows = self.held.sample(self.recipe.search_rows, self.recipe.seed)
        return make_batches(rows, self.tokenizer, 64, by_length=True)

    def _learn(self, model: nn.Module, static: StaticPath) -> nn.Module | None:
        recipe = self.recipe
        if recipe.planner_epochs <= 0:
            return None
        set_seed(recipe.seed)
        rows = self.fit.sample(recipe.planner_rows, recipe.seed)
        if recipe.objective == "values":
            planner, rows = self._menu_planner(model, static, rows)
        elif recipe.planner == "stepwise":
            planner = StepwisePlanner(model.config.hidden_size, model.dynplan.num_layers)
        else:
            planner = UpfrontPlanner(model.config.hidden_size, model.dynplan.num_layers).start_from(
                static.paths
            )
        arguments = self._arguments(
            "planner",
            epochs=recipe.planner_epochs,
            batch_size=-(-32 // self.ranks.num_processes),
            learning_rate=recipe.planner_learning_rate,
            metric_for_best_model="quality",
        )
        trainer = PlannerTrainer(
            PlannerLearner(model, planner),
            arguments,
            self.task,
            self.tokenizer,
            rows,
            self.held,
            self.callbacks,
            objective=recipe.objective,
            budgets=recipe.budgets,
            distill=recipe.distill,
        )
        start = {key: value.clone() for key, value in planner.state_dict().items()}
        before = trainer.evaluate()["eval_quality"]
        self._train(trainer, "planner")
        # Learning may have made things worse on the held-out rows; then the planner stays where it started.
        if trainer.evaluate()["eval_quality"] < before and recipe.planner != "stepwise":
            planner.load_state_dict(start)
            trainer.evaluate()
        return planner

    def _menu_planner(
        self, model, static: StaticPath, rows: EncodedDataset
    ) -> tuple[nn.Module, EncodedDataset]:
        recipe, layers = self.recipe, model.dynplan.num_layers
        fixed = len(static.paths) + 1
        candidates = candidate_paths(static.paths, layers, 3 * recipe.menu_size, recipe.seed)
        qualities = from_first(
            path_qualities(model, self._search_batches(), self.task, candidates, self.progress)
        )
        menu = choose_menu(qualities, candidates, max(recipe.menu_size, fixed), fixed)
        planner = UpfrontPlanner(model.config.hidden_size, layers, paths=menu)
        batches = make_batches(rows, self.tokenizer, 32)
        qualities = from_first(path_qualities(model, batches, self.task, planner.paths, self.progress))
        with torch.no_grad():
            # The start: every sample prefers the path with the best mean.
            planner.prior.copy_(qualities.mean(0))
        items = [
            {**item, "path_qualities": row} for item, row in zip(rows.items, qualities.tolist(), strict=True)
        ]
        return planner, EncodedDataset(items)
