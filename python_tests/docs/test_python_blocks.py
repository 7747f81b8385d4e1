"""Every Python block of README and docs runs, on tiny local models.

A block runs by itself, in a folder with what it reads: ``path/or/name``, ``DIR`` and ``OUT`` are folders of
models, ``train.jsonl`` and ``rows.csv`` files of rows. A name that a block uses without making it (``model``,
``inputs``, ``logits``) gets a stand-in; a public name of dynplan is itself.
"""

import functools
import json
import shutil

import pytest
import torch
from docs.blocks import blocks
from inference.conftest import save_classifier
from training.conftest import make_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import dynplan
from dynplan import inference, nn, ops, policies, training
from dynplan.integrations.huggingface import families
from dynplan.policies import RandomPath

BLOCKS = [block for block in blocks() if block.language == "python"]
_SENTENCES = ["good w1 w2", "bad w3"]


def make_model(text: str):
    model = AutoModelForSequenceClassification.from_pretrained("path/or/name").eval()
    return model if "dynplan.swap(model" in text else dynplan.swap(model)


def make_logits(text: str):
    return torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


def make_labels(text: str):
    return torch.randint(5, (2, 8, 8), generator=torch.Generator().manual_seed(1))


def make_inputs(text: str):
    return AutoTokenizer.from_pretrained("path/or/name")(_SENTENCES, padding=True, return_tensors="pt")


def make_batches(text: str):
    return [{**make_inputs(text), "labels": torch.tensor([1, 0])}]


def make_peft_model(text: str):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    return peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained("path/or/name").eval(), config
    )


STAND_INS = {
    "attention_mask": lambda text: make_inputs(text)["attention_mask"],
    "batches": make_batches,
    "dynplan": lambda text: dynplan,
    "input_ids": lambda text: make_inputs(text)["input_ids"],
    "inputs": make_inputs,
    "labels": make_labels,
    "logits": make_logits,
    "micro_batches": lambda text: [(make_logits(text), make_labels(text))],
    "model": make_model,
    "peft_model": make_peft_model,
    "sentences": lambda text: _SENTENCES,
    "target": make_labels,
    "torch": lambda text: torch,
    "waiting": lambda text: _SENTENCES,
}
_PUBLIC = (ops, nn, policies, training, inference, families)


class Names(dict):
    """What a block sees: what it makes itself, and for all else stand-ins and public names."""

    def __init__(self, text: str):
        super().__init__(__name__="__main__")
        self.text = text

    def __missing__(self, name: str):
        if name in STAND_INS:
            self[name] = STAND_INS[name](self.text)
            return self[name]
        for module in _PUBLIC:
            if hasattr(module, name):
                return getattr(module, name)
        raise KeyError(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What blocks read from."""
    root = tmp_path_factory.mktemp("blocks")
    (root / "path/or").mkdir(parents=True)
    name = shutil.copytree(save_classifier(root / "plain"), root / "path/or/name")
    config = AutoConfig.from_pretrained(name, max_position_embeddings=128, num_hidden_layers=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(name)
    shutil.copytree(save_classifier(root / "planned", RandomPath(0.5)), root / "OUT")
    shutil.copytree(root / "plain/encoder", root / "DIR")
    rows = make_rows()
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = [f"r{number},{row['sentence1']}" for number, row in enumerate(rows)]
    (root / "rows.csv").write_text("\n".join(["id,sentence1", *lines]) + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block, folder, tmp_path, monkeypatch, one_thread):
    if '"cuda"' in block.text and not torch.cuda.is_available():
        pytest.skip(f"{block} needs a CUDA device")
    shutil.copytree(folder, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    # The compiler's own work is other tests' matter.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    if "torch.distributed" in block.text:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        exec(compile(block.text, str(block), "exec"), Names(block.text))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_there_are_blocks():
    assert len(BLOCKS) > 20
