"""Tasks and datasets: what the labels of the rows mean, and token lists ready for a model."""

import math
import random
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from dynplan.errors import InputError

# GLUE's own names -> (kind, the figure that ranks checkpoints). A plus sign means the mean of two figures, as
# GLUE itself averages them.
_TASKS = {
    "cola": ("classification", "matthews"),
    "sst2": ("classification", "accuracy"),
    "mrpc": ("classification", "accuracy+f1"),
    "qqp": ("classification", "accuracy+f1"),
    "stsb": ("regression", "pearson+spearman"),
    "mnli": ("classification", "accuracy"),
    "qnli": ("classification", "accuracy"),
    "rte": ("classification", "accuracy"),
    "classification": ("classification", "accuracy"),
    "regression": ("regression", "pearson+spearman"),
}
TASK_NAMES = ("auto", *_TASKS)


@dataclass(frozen=True)
class Task:
    """What is predicted and which figure ranks the results.

    Attributes:
        name: of the task, one of GLUE's or "auto", "classification", "regression".
        kind: "classification" or "regression".
        labels: the label values in class order; empty for regression.
        metric: the ranking figure, two names joined by ``+`` for their mean.
    """

    name: str
    kind: str
    labels: tuple
    metric: str

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: the number of labels, 1 for regression."""
        return 1 if self.kind == "regression" else len(self.labels)


def infer_task(rows: list[dict], name: str = "auto") -> Task:
    """The task that rows hold.

    Args:
        rows: of :func:`read_rows`.
        name: of the task. "auto": any float label means regression, otherwise classification.

    Returns:
        The task.

    Raises:
        InputError: an unknown name, or labels that do not fit the kind.
    """
    if name not in TASK_NAMES:
        raise InputError(f"task: expected one of {', '.join(TASK_NAMES)}, got {name!r}")
    values = [row["label"] for row in rows]
    if name == "auto":
        kind = "regression" if any(isinstance(value, float) for value in values) else "classification"
        metric = _TASKS[kind][1]
    else:
        kind, metric = _TASKS[name]
    strings = [value for value in values if isinstance(value, str)]
    if strings and (kind == "regression" or len(strings) < len(values)):
        wanted = "numbers" if kind == "regression" else "all numbers or all strings"
        raise InputError(f"task {name}: expected {wanted} as labels, got the string {strings[0]!r}")
    if kind == "regression":
        odd = [value for value in values if not math.isfinite(value)]
        if odd:
            raise InputError(f"task {name}: expected finite numbers as labels, got {odd[0]!r}")
        return Task(name, kind, (), metric)
    fractions = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise InputError(f"task {name}: expected whole numbers or strings as labels, got {fractions[0]!r}")
    labels = tuple(sorted({int(value) if isinstance(value, float) else value for value in values}))
    if len(labels) < 2:
        raise InputError(f"task {name}: expected at least two different labels, got only {labels[0]!r}")
    return Task(name, kind, labels, metric)


def describe_task(task: Task, rows: list[dict]) -> str:
    """In a sentence, what the labels were taken for."""
    if task.kind == "classification":
        shown = ", ".join(map(str, task.labels[:8])) + (", ..." if len(task.labels) > 8 else "")
        return f"task: classification into {len(task.labels)} labels ({shown})"
    values = [row["label"] for row in rows]
    said = f"task: regression, labels from {min(values):g} to {max(values):g}"
    if task.name == "auto":
        said += "; labels written as decimals mean regression, --task classification makes them classes"
    return said


def split_rows(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Split into (rest, held out); the held-out part has ``round(share * len(rows))`` rows drawn with
    ``seed``.
    """
    held = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )


class EncodedDataset(Dataset):
    """Token lists and labels, ready for a padding collator. ``lengths``: tokens of each row."""

    def __init__(self, items: list[dict]):
        self.items = items
        self.lengths = [len(item["input_ids"]) for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]

    def sample(self, count: int, seed: int) -> "EncodedDataset":
        """At most ``count`` rows drawn with ``seed``, in their old order."""
        chosen = random.Random(seed).sample(range(len(self)), min(count, len(self)))
        return EncodedDataset([self.items[i] for i in sorted(chosen)])


def encode_rows(rows: list[dict], task: Task, tokenizer, max_length: int) -> EncodedDataset:
    """Tokenize rows.

    Args:
        rows: of :func:`read_rows`.
        task: what their labels mean.
        tokenizer (transformers.PreTrainedTokenizerBase): of the model.
        max_length: tokens that a row is cut to.

    Returns:
        A dataset of token lists and labels, ready for a padding collator.

    Raises:
        InputError: a label not the task's, or second sentences in some of the rows only.
    """
    second = [row["sentence2"] for row in rows]
    paired = sum(text is not None for text in second)
    if paired not in (0, len(rows)):
        raise InputError(
            f"expected 'sentence2' in every row or in none, got it in {paired} of {len(rows)} rows"
        )
    encoded = tokenizer(
        [row["sentence1"] for row in rows], second if paired else None, truncation=True, max_length=max_length
    )
    labels = encode_labels(rows, task)
    return EncodedDataset(
        [{**{key: encoded[key][i] for key in encoded}, "labels": labels[i]} for i in range(len(rows))]
    )


def encode_labels(rows: list[dict], task: Task) -> list:
    """Labels as numbers.

    Args:
        rows: of :func:`read_rows`.
        task: what their labels mean.

    Returns:
        Class numbers, or floats for regression.

    Raises:
        InputError: a label not the task's.
    """
    if task.kind == "regression":
        for number, row in enumerate(rows, 1):
            if isinstance(row["label"], str):
                raise InputError(
                    f"task {task.name}: expected numbers as labels, got {row['label']!r} in row {number}"
                )
        return [float(row["label"]) for row in rows]
    classes = {label: i for i, label in enumerate(task.labels)}
    # A file without types may hold only those of the string labels that look like numbers.
    named = {label: i for label, i in classes.items() if isinstance(label, str)}
    found = [classes.get(row["label"], named.get(str(row["label"]))) for row in rows]
    if None in found:
        number = found.index(None)
        shown = list(classes)[:12]
        raise InputError(
            f"task {task.name}: expected a label among {shown}{'...' if len(classes) > 12 else ''}, "
            f"got {rows[number]['label']!r} in row {number + 1}"
        )
    return found


class LengthGroupedSampler(Sampler):
    """A random order whose batches hold sentences of like length, so that a padded batch wastes little.

    Chunks of ``50 * batch_size`` random rows are sorted by length. The order depends on seed and epoch alone,
    which makes an interrupted run repeat its batches exactly.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths = torch.tensor(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches = []
        for chunk in order.split(50 * self.batch_size):
            chunk = chunk[self.lengths[chunk].argsort(descending=True, stable=True)]
            batches += chunk.split(self.batch_size)
        # A short batch must stay last: the loader cuts the flat order every batch_size rows.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter(torch.cat(shuffled + rest).tolist())
