"""Two processes of a launcher train what one does, on the same batches, and go on where they were killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from training.conftest import make_rows, save_tiny_model
from transformers import AutoConfig, AutoTokenizer

import dynplan
from dynplan.errors import InputError
from dynplan.training import Recipe, encode_rows, finetune, infer_task, ranks
from dynplan.training.losses import draw_paths
from dynplan.training.predict import make_batches, predict
from dynplan.training.study import Study, run_study

# 54 rows to learn from are three batches, so that none has to be filled up.
RECIPE = Recipe(
    planner="upfront",
    batch_size=18,
    robust_epochs=8,
    planner_epochs=2,
    planner_rows=32,
    menu_size=4,
    search_rows=6,
    search_swaps=1,
    max_length=16,
    learning_rate=1e-3,
)
OPTIONS = [
    f"--{name.replace('_', '-')}={getattr(RECIPE, name)}"
    for name in (
        "planner batch_size robust_epochs planner_epochs planner_rows menu_size search_rows search_swaps "
        "max_length learning_rate"
    ).split()
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Without dropout, whose draws no two processes share with one."""
    folder = save_tiny_model(tmp_path_factory.mktemp("calm"))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return path


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")


def launch(model, train, output, launcher=TORCHRUN, options=OPTIONS) -> subprocess.Popen:
    order = [sys.executable, "-m", *launcher, "-m", "dynplan.cli", "finetune"]
    order += ["--model", model, "--train", train, "--output", output, *options, "--threads=1"]
    return subprocess.Popen(
        [*map(str, order)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def two(model, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    said = finished(launch(model, train, folder))
    assert said.count("task: classification into 2 labels") == 1  # one of them speaks
    return folder


def test_accelerate_launches_two_processes(model, train, tmp_path):
    options = ["--exit-epochs=1", "--batch-size=18", "--max-length=16"]
    said = finished(launch(model, train, tmp_path / "out", ACCELERATE, options))
    assert said.count("task: classification into 2 labels") == 1
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["processes"] == 2
    assert dynplan.from_pretrained(tmp_path / "out").dynplan.planner.depths == (1, 2, 3)


def figures(folder, *more: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("stage", "step", "loss", "eval_score", "eval_accuracy", "eval_path_accuracy", "eval_quality")
    names += more
    found = [{name: line[name] for name in names if name in line} for line in lines]
    return [line for line in found if len(line) > 2]


def test_two_processes_give_what_one_does(model, train, two, tmp_path):
    one = tmp_path / "one"
    rows = make_rows()
    finetune(model, rows, one, recipe=RECIPE, progress=False)
    assert len(figures(one)) > 8
    for ours, wanted in zip(figures(two), figures(one), strict=True):
        assert ours.pop("stage") == wanted.pop("stage")
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert (two / "static.json").read_bytes() == (one / "static.json").read_bytes()
    task, tokenizer = infer_task(rows), AutoTokenizer.from_pretrained(one)
    batches = make_batches(encode_rows(rows, task, tokenizer, 16), tokenizer, 20)
    found = []
    for folder in (two, one):
        trained = dynplan.from_pretrained(folder)
        for budget in (1.0, 0.5):
            trained.dynplan.budget = budget
            found.append(predict(trained, batches, task))
    for ours, wanted in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(
            torch.from_numpy(ours.logits), torch.from_numpy(wanted.logits), rtol=0, atol=2e-3
        )
        assert torch.equal(ours.plan, wanted.plan)


def fork_two(work) -> list[int]:
    """Two processes that do ``work``, as a launcher would start them, without the seconds of imports; their
    ids.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in said.items()})
                AcceleratorState._reset_state(reset_partial_state=True)  # this process was alone before
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return children


def ended(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_when(children: list[int], folder, pattern: str) -> None:
    """As soon as there is a file of such a name."""
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert ended(children) == [-signal.SIGKILL] * 2


def test_two_processes_go_on_where_they_were_killed(model, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "out"

    def train(place, resume=False):
        finetune(model, make_rows(), place, recipe=RECIPE, resume=resume, progress=False)

    assert ended(fork_two(lambda: train(whole))) == [0, 0]
    kill_when(fork_two(lambda: train(output)), output, "robust-checkpoints/checkpoint-*")
    assert not (output / "dynplan.json").exists()
    with pytest.raises(InputError, match=r"resume: .* got 1 processes \(it began with 2\)"):
        finetune(model, make_rows(), output, recipe=RECIPE, resume=True, progress=False)
    assert ended(fork_two(lambda: train(output, resume=True))) == [0, 0]
    for name in ("model.safetensors", "dynplan.safetensors", "static.json", "dynplan.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_two_processes_train_exits_as_one_does(model, tmp_path, kind):
    """Every exit learns, though DDP sees one forward; for numbers a part of the exits is left unused."""
    rows = make_rows()
    if kind == "regression":
        rows = [{**row, "label": row["label"] + 0.25} for row in rows]
    recipe = replace(
        RECIPE, planner="exits", plain_epochs=1.0, exit_epochs=4.0, exit_learning_rate=1e-2
    )  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"

    def train(place):
        finetune(model, rows, place, recipe=recipe, progress=False)

    assert ended(fork_two(lambda: train(two))) == [0, 0]
    train(one)
    names = ("eval_full_score", "eval_exit_score")
    assert len(figures(one, *names)) > 4
    for ours, wanted in zip(figures(two, *names), figures(one, *names), strict=True):
        assert ours.pop("stage") == wanted.pop("stage")
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    start = dynplan.nn.Exits(16, 4, (1, 2, 3), kind == "regression").heads[0].weight
    models = [dynplan.from_pretrained(folder) for folder in (two, one)]
    found, wanted = (
        {**one.state_dict(), **{f"exits.{k}": v for k, v in one.dynplan.planner.state_dict().items()}}
        for one in models
    )
    assert (wanted["exits.heads.0.weight"] - start).abs().max() > 1e-3
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    task, tokenizer = infer_task(rows), AutoTokenizer.from_pretrained(one)
    batches = make_batches(encode_rows(rows, task, tokenizer, 16), tokenizer, 20)
    for budget in (1.0, 0.5):
        for trained in models:
            trained.dynplan.budget = budget
        ours, theirs = (predict(trained, batches, task) for trained in models)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=2e-3)
        assert (ours.plan == theirs.plan).float().mean() > 0.95


def test_a_study_by_two_processes_is_that_of_one(model, tmp_path):
    rows = make_rows()
    place = tmp_path / "data" / "sst2"
    place.mkdir(parents=True)
    for split, part in (("train", rows), ("dev", rows[:30])):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = replace(RECIPE, planner="exits", exit_epochs=2.0)
    one = Study(
        tmp_path / "data", model, tmp_path / "one", ("sst2",), budgets=(0.5,), recipe=recipe,
        own_subsets=(0.5,), seconds=0.01,
    )  # fmt: skip
    two = replace(one, output=tmp_path / "two")

    def study_two():
        results = run_study(two, progress=False)
        assert results == json.loads((two.output / "results.json").read_text())  # on either

    kill_when(fork_two(study_two), two.output, "sst2-0/ordinary/recipe.json")
    kept = (two.output / "sst2-0" / "exits" / "dynplan.json").stat().st_mtime_ns
    assert ended(fork_two(study_two)) == [0, 0]
    assert (two.output / "sst2-0" / "exits" / "dynplan.json").stat().st_mtime_ns == kept
    results = json.loads((two.output / "results.json").read_text())
    wanted = run_study(one, progress=False)
    assert {(row["name"], row["budget"]) for row in results["rows"]} == {
        (row["name"], row["budget"]) for row in wanted["rows"]
    }
    for row, other in zip(results["rows"], wanted["rows"], strict=True):
        assert row["score"] == pytest.approx(other["score"], abs=1.01 / 30), row["name"]
    assert not list(two.output.rglob("*-checkpoints")) and not list(two.output.rglob(".unfinished*"))
    with pytest.raises(InputError, match="--batch-size to be a multiple of 2 processes, got 17"):
        ranks_of_two = replace(two, recipe=replace(recipe, batch_size=17), output=tmp_path / "odd")
        with pytest.MonkeyPatch.context() as patch:
            fake = types.SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
            patch.setattr(ranks, "processes", lambda: fake)
            run_study(ranks_of_two, progress=False)
    assert not (tmp_path / "odd").exists()


@pytest.fixture
def as_process(monkeypatch):
    def become(index: int) -> None:
        fake = types.SimpleNamespace(num_processes=2, process_index=index)
        monkeypatch.setattr(ranks, "processes", lambda: fake)

    return become


def test_processes_draw_different_paths_that_are_those_of_one(as_process):
    shares = []
    for index in range(2):
        as_process(index)
        torch.manual_seed(5)
        shares.append(ranks.draw_share(lambda rows: draw_paths(rows, 6, (2, 4)), 8))
    torch.manual_seed(5)
    assert torch.equal(torch.cat(shares), draw_paths(16, 6, (2, 4)))
    assert not torch.equal(*shares)


def test_a_batch_that_cannot_be_shared_is_refused(as_process):
    as_process(0)
    assert ranks.share_of_batch(16) == 8
    with pytest.raises(InputError, match="--batch-size to be a multiple of 2 processes, got 17"):
        ranks.share_of_batch(17)
