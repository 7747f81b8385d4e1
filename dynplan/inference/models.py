"""The model of a run: a swapped encoder with its head, or with a pooling for sentence embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import dynplan
from dynplan.errors import InputError
from dynplan.inference.fields import Field
from dynplan.loading import check_config, load, missing_weights
from dynplan.policies import RandomPath
from dynplan.policy_files import DESCRIPTION
from dynplan.stream_budget import StreamBudget

POOLINGS = ("mean", "cls", "max")
_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers, what is done here


@dataclass(frozen=True)
class ModelSettings:
    """Everything a process needs to make the model.

    Args:
        folder: of the model.
        task: "predict" or "embed".
        budget: share of layer work, 0..1; None: the saved one.
        weights: "int8" or "bfloat16", for :func:`dynplan.swap`; None: the model's own.
        pooling: of embeddings, "mean", "cls" or "max"; None: what the folder says.
        normalize: whether embeddings have length 1; None: what the folder says.
        stream_budget: share of a :class:`~dynplan.StreamBudget` over all rows of a run, in the place of
            ``budget``.
        burst: of that budget, in rows.

    Raises:
        InputError: budgets out of range, two of them, or a burst without its stream.
    """

    folder: Path
    task: str = "predict"
    budget: float | None = None
    weights: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    stream_budget: float | None = None
    burst: float | None = None

    def __post_init__(self):
        for option, share in (("--budget", self.budget), ("--stream-budget", self.stream_budget)):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{option}: expected a number within 0..1, got {share}")
        if self.stream_budget is not None and self.budget is not None:
            raise InputError(
                "--stream-budget: expected no --budget beside it, got "
                f"--stream-budget {self.stream_budget} and --budget {self.budget}"
            )
        if self.burst is not None and self.stream_budget is None:
            raise InputError(f"--burst: expected --stream-budget beside it, got --burst {self.burst} alone")
        if self.burst is not None and not 0 <= self.burst < 2**31:
            raise InputError(f"--burst: expected a number of rows from 0 to 2**31, got {self.burst}")

    @property
    def asked_budget(self) -> float | StreamBudget | None:
        """The budget that is asked for, a stream's new; None: the saved one."""
        if self.stream_budget is None:
            return self.budget
        return StreamBudget(self.stream_budget, **({} if self.burst is None else {"burst": self.burst}))

    def load(self) -> RunModel:
        """Raises InputError for a folder or settings that cannot be used."""
        return Classifier(self) if self.task == "predict" else Embedder(self)


class RunModel:
    """A swapped model that turns padded batches into columns of the output."""

    fields: list[Field]

    def __init__(self, settings: ModelSettings):
        self.settings, self.folder = settings, Path(settings.folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"model: expected a folder with a Hugging Face model, got {self.folder}")
        check_config(self.folder, load("model", self.folder, AutoConfig.from_pretrained))
        self.model = self._load().to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.control = self.model.dynplan
        budget = settings.asked_budget
        if budget is not None:
            if not self.control.policy.takes_budget:
                option = "--budget" if settings.stream_budget is None else "--stream-budget"
                raise InputError(
                    f"{option}: expected a model whose policy takes one, got "
                    f"{type(self.control.policy).__name__}; `dynplan finetune` makes a planner"
                )
            self.control.budget = budget
        self._policy = self.control.policy

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.control.longest

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens that rows are cut to where nothing else is asked for: as in training or as the tokenizer
        says, if that is known.
        """
        said = (_json(self.folder / "tokenizer_config.json") or {}).get("model_max_length")
        return min(self._trained_length() or said or self.longest, self.longest)

    @property
    def stream(self) -> dict[str, int] | None:
        """What the stream's budget has counted so far; None where the budget is not a stream's."""
        budget = self.control.budget
        return budget.state if isinstance(budget, StreamBudget) else None

    def begin(self, stream: dict[str, int] | None) -> None:
        """Before a run's first window: have the stream's budget, if there is one, go on from ``stream``, or
        from nothing where that is None.

        Raises InputError for counts that none has.
        """
        budget = self.control.budget
        if not isinstance(budget, StreamBudget):
            return
        if stream is None:
            budget.reset()
            return
        try:
            budget.state = stream
        except ValueError as error:
            raise InputError(f"--resume: {error}") from error

    def restart(self, file: int, window: int) -> None:
        """Have random paths depend on the window alone, whatever was run before it."""
        if isinstance(self._policy, RandomPath):
            seed = self._policy.seed + 1_000_003 * file + window
            self.control.policy = RandomPath(self._policy.budget, seed)

    def run(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What comes out for a padded batch, float32 ``(B, C)``, and the plan, bool ``(B, L)``; both on the
        CPU.
        """
        output = self._forward({name: value.to(self.device) for name, value in batch.items()})
        return output.float().cpu(), self.control.last_plan.cpu()

    def columns(self, output: Tensor) -> dict[str, list | Tensor]:
        """Columns for :attr:`fields` of all outputs of a window."""
        raise NotImplementedError(f"{type(self).__name__}: expected columns() to be defined by its kind")

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}: expected _forward() to be defined by its kind")

    def _trained_length(self) -> int | None:
        return None

    def _load(self) -> nn.Module:
        if (self.folder / DESCRIPTION).is_file():

            def from_folder(folder):
                return dynplan.from_pretrained(folder, weights=self.settings.weights, dtype=torch.float32)

            return load("model", self.folder, from_folder)

        def plain(folder):
            return self._class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)

        model, info = load("model", self.folder, plain)
        # First whether it is supported at all: another architecture lacks most weights.
        model = load("model", self.folder, lambda _: dynplan.swap(model, weights=self.settings.weights))
        missing_weights(self.folder, model, info)
        self._check_head(info["missing_keys"])
        return model

    def _check_head(self, fresh: Sequence[str]) -> None:
        pass


class Classifier(RunModel):
    """Label and probabilities of each row, or its score where the model is a regression."""

    _class = AutoModelForSequenceClassification

    def __init__(self, settings: ModelSettings):
        super().__init__(settings)
        name = type(self.model).__name__
        if not name.endswith("ForSequenceClassification"):
            raise InputError(f"model: expected one for classification of sentences, got {name}")
        config = self.model.config
        self.regression = config.num_labels == 1
        if config.problem_type == "multi_label_classification":
            raise InputError(f"model: expected one label for each row, got {config.problem_type}")
        self.labels = _trained(self.folder, "task", "labels") or [
            config.id2label[i] for i in range(config.num_labels)
        ]
        if self.regression:
            self.fields = [Field("score", "real")]
        else:
            kind = "whole" if all(isinstance(label, int) for label in self.labels) else "text"
            self.fields = [Field("label", kind), *(Field(f"probability_{x}", "real") for x in self.labels)]

    def columns(self, output: Tensor) -> dict[str, list | Tensor]:
        if self.regression:
            return {"score": output.squeeze(1)}
        probabilities = output.softmax(1)
        columns = {field.name: probabilities[:, i] for i, field in enumerate(self.fields[1:])}
        return {"label": [self.labels[i] for i in output.argmax(1).tolist()], **columns}

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).logits

    def _trained_length(self) -> int | None:
        return _trained(self.folder, "recipe", "max_length")

    def _check_head(self, fresh: Sequence[str]) -> None:
        fresh = sorted(fresh)
        if fresh:
            raise InputError(
                f"model: expected a head that was trained in {self.folder}, got no weights for {fresh[0]}"
            )


class Embedder(RunModel):
    """One vector for each row, pooled from the last hidden states as sentence-transformers does."""

    _class = AutoModel

    def __init__(self, settings: ModelSettings):
        super().__init__(settings)
        said = _sentence_settings(self.folder)
        self.pooling = settings.pooling or said.get("pooling", "mean")
        self.normalize = said.get("normalize", False) if settings.normalize is None else settings.normalize
        if self.pooling not in POOLINGS:
            raise InputError(f"--pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        self._said_length = said.get("max_length")
        self.fields = [Field("embedding", "vector", self.model.config.hidden_size)]

    def columns(self, output: Tensor) -> dict[str, list | Tensor]:
        return {"embedding": output}

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.model.base_model(**batch).last_hidden_state
        pooled = pool(hidden, batch["attention_mask"], self.pooling)
        return nn.functional.normalize(pooled, dim=1) if self.normalize else pooled

    def _trained_length(self) -> int | None:
        return self._said_length


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Sentence embeddings, ``(B, H)``.

    Args:
        hidden: last hidden states, float ``(B, S, H)``.
        mask: integer ``(B, S)``, one at tokens.
        pooling: "mean" over the tokens, "cls" for the first one, "max" over the tokens.
    """
    if pooling == "cls":
        return hidden[:, 0]
    tokens = mask.unsqueeze(2).to(hidden.dtype)
    if pooling == "max":
        # Zero for rows without tokens, where there is no largest one.
        return hidden.masked_fill(tokens == 0, -torch.inf).amax(1).nan_to_num(neginf=0.0)
    return (hidden * tokens).sum(1) / tokens.sum(1).clamp_min(1e-9)


def _sentence_settings(folder: Path) -> dict:
    """Pooling, normalize and max_length of a folder of sentence-transformers; another folder says nothing."""
    modules = _json(folder / "modules.json")
    if modules is None:
        return {}
    names = [module["type"].rpartition(".")[2] for module in modules]
    if names[:2] != ["Transformer", "Pooling"] or set(names) - set(_MODULES):
        raise InputError(f"model: expected modules {', '.join(_MODULES)} in {folder}, got {', '.join(names)}")
    said = _json(folder / modules[1]["path"] / "config.json") or {}
    # The older way: "pooling_mode_mean_tokens": true.
    chosen = [key for key, value in said.items() if key.startswith("pooling_mode_") and value]
    legacy = (
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in chosen
    )
    pooling = said.get("pooling_mode") or "+".join(legacy)
    if (_json(folder / "config_sentence_transformers.json") or {}).get("default_prompt_name"):
        raise InputError(f"model: expected no default prompt in {folder}, got one")
    sentence = _json(folder / "sentence_bert_config.json") or {}
    if sentence.get("do_lower_case"):
        raise InputError(f"model: expected no do_lower_case in {folder}, got it")
    length = sentence.get("max_seq_length") or sentence.get("max_length")
    return {"pooling": pooling or "mean", "normalize": "Normalize" in names, "max_length": length}


def _trained(folder: Path, part: str, name: str):
    """A setting that `dynplan finetune` noted; None where it did not write the folder."""
    return ((_json(folder / "recipe.json") or {}).get(part) or {}).get(name)


def _json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"model: expected {path} to be JSON, got {error}") from error
