"""Swapped models on disk."""

import json
import os
import subprocess
import sys

import pytest
import torch
from integrations.models import batch, tiny
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import dynplan
from dynplan import policy_files as checkpoint
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.policies import FixedPath, HashPath, KeepAll, PlannerPolicy, RandomPath, StaticPath

pytestmark = pytest.mark.usefixtures("one_thread")


def planner(kind):
    torch.manual_seed(9)
    if kind == "stepwise":
        made = StepwisePlanner(32, 4).calibrate(torch.randn(50))
    elif kind == "paths":
        made = UpfrontPlanner(32, 4, paths=[(0,), (0, 1), (1, 3), (0, 1, 2, 3)])
    else:
        made = UpfrontPlanner(32, 4, width=8)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    if kind == "paths":
        made.calibrate(torch.randn(40, 5))
    return made


POLICIES = {
    "keep-all": KeepAll,
    "fixed": lambda: FixedPath([True, False, True, True]),
    "random": lambda: RandomPath(0.6, seed=4),
    "hash": lambda: HashPath(0.5, seed=2),
    "static": lambda: StaticPath({1: [2], 2: [0, 2], 3: [0, 1, 3]}, budget=0.5),
    "upfront": lambda: PlannerPolicy(planner("upfront"), 0.5),
    "paths": lambda: PlannerPolicy(planner("paths"), 0.5),
    "stepwise": lambda: PlannerPolicy(planner("stepwise"), 0.5),
}
LOAD = """
import sys, torch, dynplan
torch.set_num_threads(1)
model = dynplan.from_pretrained(sys.argv[1])
inputs = torch.load(sys.argv[1] + "/inputs.pt")
with torch.no_grad():
    torch.save((model(**inputs).logits, model.dynplan.last_plan), sys.argv[1] + "/outputs.pt")
"""


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_round_trip(name, tmp_path):
    model, inputs = dynplan.swap(tiny(), POLICIES[name]()), batch()
    if model.dynplan.policy.takes_budget:
        model.dynplan.budget = 0.75
    model.save_pretrained(tmp_path)
    logits, plan = model(**inputs).logits, model.dynplan.last_plan
    again = dynplan.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, logits) and torch.equal(again.dynplan.last_plan, plan)
    assert again.dynplan.budget == model.dynplan.budget
    assert again.dynplan.policy.to_config() == model.dynplan.policy.to_config()
    assert (tmp_path / checkpoint.WEIGHTS).exists() == (model.dynplan.planner is not None)


@torch.no_grad()
def test_a_fresh_process_predicts_the_same_bits(tmp_path):
    model, inputs = dynplan.swap(tiny("electra"), POLICIES["upfront"]()), batch()
    model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    logits, plan = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(logits, model(**inputs).logits) and torch.equal(plan, model.dynplan.last_plan)


@torch.no_grad()
def test_transformers_loads_the_unmodified_model(tmp_path):
    model, inputs = tiny(), batch()
    expected = model(**inputs).logits
    dynplan.swap(model, POLICIES["upfront"]()).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is type(model) and not hasattr(plain, "dynplan")
    assert torch.equal(plain(**inputs).logits, expected)
    dynplan.unswap(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / checkpoint.DESCRIPTION).exists()


def test_a_folder_without_a_policy(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="expected dynplan.json in .* load the model with transformers"
    ):
        dynplan.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a local folder, got 'no/such'"):
        dynplan.from_pretrained("no/such")


def saved(folder):
    dynplan.swap(tiny(), POLICIES["upfront"]()).save_pretrained(folder)
    return folder / checkpoint.DESCRIPTION, folder / checkpoint.WEIGHTS


def test_damaged_folders_are_refused(tmp_path):
    description, weights = saved(tmp_path)
    good = json.loads(description.read_text())

    def refuse(change, error, text):
        description.write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
        with pytest.raises(error, match=text):
            dynplan.from_pretrained(tmp_path)

    refuse('{"format": 1', ValueError, "to be a dynplan description")
    refuse("[]", ValueError, "to be a dynplan description")
    refuse({"format": 2}, ValueError, "expected format 1 in .*, got 2; update dynplan")
    refuse({"policy": {"type": "Oracle"}}, ValueError, "expected type to be a policy's, got 'Oracle'")
    refuse({"policy": {"type": "RandomPath", "sed": 1}}, ValueError, "expected the arguments of RandomPath")
    refuse({"budget": 7}, ValueError, "expected budget to be within 0..1, got 7")
    save_file({"score.weight": torch.zeros(1)}, weights)
    refuse({}, ValueError, "to have SHA-256 .*, got .*; it was not saved together with dynplan.json")
    weights.unlink()
    refuse({}, FileNotFoundError, "expected the planner's weights in .*, got no such file")


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    description, weights = saved(tmp_path)
    before = description.read_bytes(), weights.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save_policy(tmp_path, POLICIES["paths"]())
    assert (description.read_bytes(), weights.read_bytes()) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".dynplan")]


@pytest.mark.parametrize("stroke", range(5))
def test_a_killed_save_leaves_one_policy_or_the_other(stroke, tmp_path, monkeypatch):
    """A kill runs no handler: each file operation in turn is the last that happens."""
    description, _ = saved(tmp_path)
    old, new = json.loads(description.read_text())["policy"], POLICIES["paths"]()
    left, replace = [stroke], os.replace

    class Killed(BaseException):
        pass

    def counted(*places):
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(*places)

    monkeypatch.setattr(os, "replace", counted)
    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(type(tmp_path), "unlink", lambda *_, **__: None)
    try:
        checkpoint.save_policy(tmp_path, new)
    except Killed:
        pass
    monkeypatch.undo()
    policy, _ = checkpoint.load_policy(tmp_path)
    assert policy.to_config() == (old if stroke < 2 else new.to_config())
    checkpoint.save_policy(tmp_path, new)
    assert not list(tmp_path.glob("dynplan-*"))


def test_a_planner_of_another_model_is_refused(tmp_path):
    dynplan.swap(tiny(num_hidden_layers=3), POLICIES["upfront"]()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a planner of num_layers 3 in .*, got 4"):
        dynplan.from_pretrained(tmp_path)


def test_a_model_class_is_not_taken_from_anywhere(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["pipeline"]}))
    with pytest.raises(
        ValueError, match="expected a model class of transformers in config.json, got pipeline"
    ):
        dynplan.from_pretrained(tmp_path)


def test_a_policy_without_a_planner_removes_old_weights(tmp_path):
    _, weights = saved(tmp_path)
    checkpoint.save_policy(tmp_path, KeepAll())
    assert not weights.exists()
    assert type(checkpoint.load_policy(tmp_path)[0]) is KeepAll


def test_upload_in_the_same_call_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected push_to_hub=False on a swapped model, got True"):
        dynplan.swap(tiny()).save_pretrained(tmp_path, push_to_hub=True)


def test_only_the_main_process_writes(tmp_path):
    dynplan.swap(tiny()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / checkpoint.DESCRIPTION).exists()
