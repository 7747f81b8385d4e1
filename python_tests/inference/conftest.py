"""A tiny classifier that draws a random path for every row, and rows to run it on."""

import json
import random
from pathlib import Path

import pytest
import torch
from training.conftest import WORDS, save_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dynplan
from dynplan.nn import Exits
from dynplan.policies import ConfidenceExit, RandomPath


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread costs a model this small more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_classifier(folder: Path, policy=None) -> Path:
    """Under ``policy``, or as Hugging Face alone would have it."""
    encoder = save_tiny_model(folder / "encoder")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, id2label={0: "poor", 1: "good, or so"}, label2id={"poor": 0, "good, or so": 1}
    )
    with torch.no_grad():  # rows of like results would hide that two changed places
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)
    if policy is not None:
        dynplan.swap(model, policy)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("planned"), RandomPath(0.5, seed=3))


@pytest.fixture(scope="session")
def leaving(tmp_path_factory):
    """With exits that were never trained: who leaves where depends on what is left to spend."""
    torch.manual_seed(2)
    exits = Exits(16, 4, (1, 2, 3))
    for weight in exits.parameters():  # answers of unlike sureness
        torch.nn.init.normal_(weight)
    policy = ConfidenceExit(exits, 1.0, [[1, 2, 3, 4]], [0] * 5, [[0.5, 0.7, 0.8, 0.9, 1.1]])
    return save_classifier(tmp_path_factory.mktemp("leaving"), policy)


def make_records(count: int) -> list[dict]:
    draw = random.Random(0)
    return [
        {"id": f"r{i}", "sentence1": " ".join(draw.choices(WORDS[4:], k=draw.randint(1, 20)))}
        for i in range(count)
    ]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
