"""The whole recipe, stage by stage: plain, robust, static, planner. Each stage leaves a folder that a resumed
run reuses.

What DPBERT (arXiv 2308.00108) does between "fine-tune" and "plan" is not published; stages, losses and
schedules here are ours. Only training rows are used: a slice of them is held out of fine-tuning to rank
checkpoints, to find the best fixed paths and to stop the planner.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

import dynplan
from dynplan.budget import whole_layers
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.policies import PlannerPolicy, StaticPath
from dynplan.training.data import EncodedDataset, InputError, Task, encode_rows, infer_task, split_rows
from dynplan.training.menu import candidate_paths, choose_menu
from dynplan.training.planning import OBJECTIVES, PlannerLearner, PlannerTrainer
from dynplan.training.predict import make_batches, path_qualities, predict
from dynplan.training.trainer import PlainTrainer, RobustTrainer, training_arguments

PLANNERS = ("upfront", "stepwise")


@dataclass(frozen=True)
class Recipe:
    """Every setting of :func:`finetune`. Shares and budgets are of layer work, 0..1; lengths in tokens."""

    plain_epochs: float = 0.0
    robust_epochs: float = 3.0
    planner_epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 5e-5
    robust_learning_rate: float | None = None
    planner_learning_rate: float = 1e-3
    planner: str = "upfront"
    planner_objective: str | None = None
    planner_rows: int = 2000
    menu_size: int = 12
    search_rows: int = 256
    search_swaps: int = 16
    budgets: tuple[float, ...] = (0.75, 0.5)
    shares: tuple[float, float] = (0.4, 0.9)
    distill: float = 1.0
    holdout: float = 0.1
    max_length: int = 128
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"finetune: expected budgets within 0..1, got {budget}")
        if self.planner not in PLANNERS:
            raise InputError(
                f"finetune: expected planner to be one of {', '.join(PLANNERS)}, got {self.planner!r}"
            )
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"finetune: expected objective to be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.planner == "stepwise" and self.objective != "gates":
            raise InputError(
                f"finetune: expected objective gates for a stepwise planner, got {self.objective!r}"
            )

    @property
    def objective(self) -> str:
        return self.planner_objective or ("gates" if self.planner == "stepwise" else "values")


def check_output(folder: Path, resume: bool = False) -> Path:
    """Make ``folder`` and see that it can be written, before any time is spent.

    Raises InputError when it cannot, or when it holds a run already and ``resume`` is not set.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    if not resume and (folder / "recipe.json").exists():
        raise InputError(
            f"output: expected an empty folder, got {folder} with a run in it; resume it or choose another"
        )
    return folder


def finetune(
    model: str | Path,
    rows: list[dict],
    output: str | Path,
    task: str = "auto",
    recipe: Recipe = Recipe(),
    resume: bool = False,
    progress: bool = True,
    callbacks=(),
) -> nn.Module:
    """Fine-tune the encoder in folder ``model`` on ``rows`` and learn its planner; returns the swapped model.

    ``output`` receives the model with planner and policy (``dynplan.from_pretrained`` reads it), its
    tokenizer, ``recipe.json``, ``metrics.jsonl`` and the stages' own folders. With ``resume`` finished stages
    are taken from there and an interrupted one goes on from its last checkpoint.

    Raises InputError for an output folder that cannot be used and for rows that do not fit the task.
    """
    return _Run(model, rows, Path(output), task, recipe, resume, progress, callbacks).run()


class _Run:
    def __init__(self, model, rows, output, task, recipe, resume, progress, callbacks):
        self.output, self.recipe, self.resume = check_output(output, resume), recipe, resume
        self.progress, self.callbacks, self.source = progress, callbacks, Path(model)
        self.task: Task = infer_task(rows, task)
        if not (self.source / "config.json").exists():
            raise InputError(f"model: expected a folder with a Hugging Face model, got {model}")
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        fit, held = split_rows(rows, recipe.holdout, recipe.seed)
        if not held:
            raise InputError(
                f"finetune: expected rows enough to hold out {recipe.holdout:.0%} of them, got {len(rows)}"
            )
        self.fit, self.held = self._encode(fit), self._encode(held)
        described = {"task": asdict(self.task), "recipe": asdict(recipe), "model": self.source.name}
        (self.output / "recipe.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def _encode(self, rows: list[dict]) -> EncodedDataset:
        return encode_rows(rows, self.task, self.tokenizer, self.recipe.max_length)

    def run(self) -> nn.Module:
        folder = self.source
        if self.recipe.plain_epochs > 0:
            folder = self._fit_encoder(
                folder, PlainTrainer, self.recipe.plain_epochs, self.recipe.learning_rate
            )
        if self.recipe.robust_epochs > 0:
            rate = self.recipe.robust_learning_rate or self.recipe.learning_rate
            folder = self._fit_encoder(folder, RobustTrainer, self.recipe.robust_epochs, rate)
        model = dynplan.swap(self._load(folder)).to("cuda" if torch.cuda.is_available() else "cpu")
        static = self._search(model)
        planner = self._learn(model, static)
        model.requires_grad_(True)
        model.dynplan.policy = PlannerPolicy(planner) if planner is not None else static
        model.save_pretrained(self.output)
        self.tokenizer.save_pretrained(self.output)
        return model

    def _load(self, folder: Path) -> nn.Module:
        labels = {i: str(label) for i, label in enumerate(self.task.labels)} or {0: "score"}
        # A new head draws its weights from the global generator.
        set_seed(self.recipe.seed)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, id2label=labels, label2id={label: i for i, label in labels.items()}, dtype=torch.float32
        )

    def _checkpoints(self, stage: str) -> Path:
        return self.output / f"{stage}-checkpoints"

    def _arguments(self, stage: str, **settings):
        return training_arguments(
            self._checkpoints(stage), seed=self.recipe.seed, progress=self.progress, **settings
        )

    def _train(self, trainer, stage: str) -> None:
        folder = self._checkpoints(stage)
        checkpoint = get_last_checkpoint(str(folder)) if self.resume and folder.is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)

    def _fit_encoder(self, source: Path, trainer_class, epochs: float, learning_rate: float) -> Path:
        stage = trainer_class.stage
        done = self.output / stage
        if self.resume and (done / "config.json").exists():
            return done
        model = self._load(source)
        extra = {}
        if trainer_class is RobustTrainer:
            model = dynplan.swap(model)
            extra = {"shares": self.recipe.shares, "distill": self.recipe.distill}
        arguments = self._arguments(
            stage,
            epochs=epochs,
            batch_size=self.recipe.batch_size,
            learning_rate=learning_rate,
            bf16=self.recipe.bf16,
        )
        trainer = trainer_class(
            model, arguments, self.task, self.tokenizer, self.fit, self.held, self.callbacks, **extra
        )
        self._train(trainer, stage)
        if trainer_class is RobustTrainer:
            model = dynplan.unswap(model)
        model.save_pretrained(done)
        self.tokenizer.save_pretrained(done)
        return done

    def _search(self, model: nn.Module) -> StaticPath:
        place = self.output / "static.json"
        if self.resume and place.exists():
            paths = json.loads(place.read_text(encoding="utf-8"))
            return StaticPath({int(size): layers for size, layers in paths.items()})
        layers = model.dynplan.num_layers
        sizes = {whole_layers(budget, layers) for budget in self.recipe.budgets} - {0, layers}
        sizes |= {size + 1 for size in sizes if size + 1 < layers}
        static = StaticPath.search(
            model,
            self._search_batches(),
            sizes or {1},
            swaps=self.recipe.search_swaps,
            seed=self.recipe.seed,
            progress=self.progress,
            # By what is scored, like the planner's table: by the loss alone, a path that predicts one class
            # with little confidence can win.
            cost=lambda model, batches: -float(predict(model, batches, self.task).quality(self.task).mean()),
        )
        place.write_text(json.dumps(static.options()["paths"]) + "\n", encoding="utf-8")
        return static

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
            batch_size=32,
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
        qualities = path_qualities(model, self._search_batches(), self.task, candidates, self.progress)
        menu = choose_menu(qualities, candidates, max(recipe.menu_size, fixed), fixed)
        planner = UpfrontPlanner(model.config.hidden_size, layers, paths=menu)
        batches = make_batches(rows, self.tokenizer, 32)
        qualities = path_qualities(model, batches, self.task, planner.paths, self.progress)
        with torch.no_grad():
            # The start: every sample prefers the path with the best mean.
            planner.prior.copy_(qualities.mean(0))
        items = [
            {**item, "path_qualities": row} for item, row in zip(rows.items, qualities.tolist(), strict=True)
        ]
        return planner, EncodedDataset(items)
