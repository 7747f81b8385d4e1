"""Policy files from anywhere: damage is the documented error, and no file can break the budget's contract."""

import hashlib
import json
import random

import pytest
import torch
from integrations.test_checkpoint import POLICIES
from safetensors.torch import load, save, save_file

from dynplan import policy_files as checkpoint
from dynplan.policies import PlanRequest

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WIDTH = 4, 32
ODD = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**62, 10**19, -(10**30), 0.0, 0.5, -0.5, 1.5, 1e300, 1e-300),
    *(
        "",
        "1",
        "nan",
        "KeepAll",
        "_Look",
        "UpfrontPlanner",
        "\ud800",
        [],
        {},
        [[]],
        [{}],
        {"type": "KeepAll"},
    ),
    *([0], [True], ["0"], [0.0], [0, 0], [[0]], [[0, 0]], [[9]], [None] * 5, {"1": "2"}, {"1": [2.5]}),
    *(float("nan"), float("inf"), 10**400),
)
RAW = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b"1e400",
    b"NaN",
    b"\xff\xfe",
    b"\0",
    b"{}",
    b"null",
    b"",
)


def rewrite(folder, description=None, tensors=None):
    """Write the two files so that they belong together."""
    if tensors is not None:
        save_file(tensors, folder / checkpoint.WEIGHTS)
        description = description or json.loads((folder / checkpoint.DESCRIPTION).read_text())
        weights = (folder / checkpoint.WEIGHTS).read_bytes()
        description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / checkpoint.DESCRIPTION).write_text(json.dumps(description))


def places(value, path=()):
    """Every node of a JSON value, the containers too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(value, draw):
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        path = draw.choice(list(places(value)))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if not path:
            return draw.choice(ODD)
        move = draw.choice(("set", "set", "drop", "add"))
        if move == "drop":
            del holder[path[-1]]
        elif move == "add" and isinstance(holder, dict):
            holder[draw.choice(("type", "paths", "budget", "planner", "x"))] = draw.choice(ODD)
        else:
            holder[path[-1]] = draw.choice(ODD)
    return value


def check_contract(policy, budget):
    """What loads also plans, within its budget, or says by ValueError that it does not fit."""
    lengths = torch.tensor([0, 3, 3, 8, 9])
    request = PlanRequest(
        4,
        LAYERS,
        torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0)),
        lengths.int(),
        budget,
        torch.arange(20).view(4, 5),
        torch.arange(5).expand(4, 5) < lengths.diff().unsqueeze(1),
    )
    try:
        if policy.stepwise:
            plan = torch.zeros(4, LAYERS, dtype=torch.bool)
            for layer in range(LAYERS):
                plan[:, layer] = policy.keep(layer, request, request.hidden, plan)
        else:
            plan = policy.plan(request)
    except ValueError:
        return
    assert plan.dtype == torch.bool and plan.shape == (4, LAYERS)
    if policy.takes_budget:
        share = policy.budget_of(request)
        assert plan[lengths.diff() > 0].sum() <= share * 3 * LAYERS + 1e-6
        assert (plan.sum(1) * lengths.diff()).sum() <= share * 9 * LAYERS + 1e-6


def load_or_refuse(folder):
    try:
        policy, budget = checkpoint.load_policy(folder)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) or "Error(s) in loading" in str(error)
        return False
    check_contract(policy, budget)
    return True


@pytest.mark.parametrize("name", POLICIES)
def test_mutated_descriptions(name, tmp_path):
    checkpoint.save_policy(tmp_path, POLICIES[name](), 0.5)
    good = json.loads((tmp_path / checkpoint.DESCRIPTION).read_text())
    assert load_or_refuse(tmp_path)
    draw, loaded = random.Random(name), 0
    for _ in range(100):
        rewrite(tmp_path, mutated(good, draw))
        loaded += load_or_refuse(tmp_path)
    assert loaded < 50


def test_mutated_bytes(tmp_path):
    checkpoint.save_policy(tmp_path, POLICIES["paths"](), 0.5)
    path, draw = tmp_path / checkpoint.DESCRIPTION, random.Random(0)
    good = path.read_bytes()
    for change in RAW:
        for text in (change, good[:200] + change + good[200:], good.replace(b"0.5", change or b"0")):
            path.write_bytes(text)
            load_or_refuse(tmp_path)
    for _ in range(200):
        text = bytearray(good)
        for _ in range(draw.choice((1, 1, 3))):
            text[draw.randrange(len(text))] = draw.randrange(256)
        path.write_bytes(text[: draw.choice((len(text), draw.randrange(len(text))))])
        load_or_refuse(tmp_path)


@pytest.mark.parametrize("name", ["upfront", "paths", "stepwise"])
def test_mutated_weights(name, tmp_path):
    checkpoint.save_policy(tmp_path, POLICIES[name](), 0.5)
    weights, draw = tmp_path / checkpoint.WEIGHTS, random.Random(name)
    good = load(weights.read_bytes())
    changes = (
        lambda t: t.double(),
        lambda t: t.to(torch.int32),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: torch.full_like(t, True),
        lambda t: torch.full_like(t.float(), float("nan")),
        lambda t: torch.full_like(t.float(), float("-inf")),
        lambda t: t[..., :1].clone(),
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
    )
    for _ in range(60):
        tensors = dict(good)
        key = draw.choice(list(tensors))
        tensors[draw.choice((key, key, key, "another"))] = draw.choice(changes)(tensors[key]).clone()
        if draw.random() < 0.1:
            del tensors[key]
        rewrite(tmp_path, tensors=tensors)
        load_or_refuse(tmp_path)
    text = bytearray(save(good))
    for _ in range(60):  # a header that says anything
        text[draw.randrange(min(len(text), 400))] = draw.randrange(256)
        weights.write_bytes(text)
        description = json.loads((tmp_path / checkpoint.DESCRIPTION).read_text())
        rewrite(tmp_path, {**description, "weights_sha256": hashlib.sha256(text).hexdigest()})
        load_or_refuse(tmp_path)


def test_the_table_of_paths_is_the_described_one(tmp_path):
    """A table of ones under the description's sizes would spend all at any budget."""
    checkpoint.save_policy(tmp_path, POLICIES["paths"](), 0.25)
    good = load((tmp_path / checkpoint.WEIGHTS).read_bytes())
    for table in (torch.ones_like(good["paths"]), ~good["paths"], good["paths"].int()):
        rewrite(tmp_path, tensors={**good, "paths": table})
        with pytest.raises(ValueError, match="expected weights of UpfrontPlanner in .*paths"):
            checkpoint.load_policy(tmp_path)
    planner = POLICIES["paths"]().planner
    before = planner.paths.clone()
    with pytest.raises(RuntimeError, match="expected paths to be the table that this planner was made with"):
        planner.load_state_dict({**planner.state_dict(), "paths": torch.ones_like(before)}, assign=True)
    assert torch.equal(planner.paths, before)
