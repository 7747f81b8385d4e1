import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import requires_cuda
from transformers import AutoTokenizer, TrainerCallback

import dynplan
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.training import (
    InputError,
    Recipe,
    check_output,
    encode_rows,
    evaluate,
    finetune,
    load_run,
    plain_model,
)
from dynplan.training.predict import make_batches, predict

QUICK = Recipe(
    planner="upfront",
    robust_epochs=2,
    planner_epochs=1,
    planner_rows=32,
    menu_size=4,
    search_rows=8,
    search_swaps=1,
    max_length=16,
    learning_rate=3e-3,
)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tuned(tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    finetune(tiny_model, rows, folder, recipe=replace(QUICK, plain_epochs=1), progress=False)
    return folder


def test_run_leaves_what_it_promises(tuned):
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"plain", "robust", "planner"}
    assert any("eval_score" in line for line in lines)
    task, recipe, static = load_run(tuned)
    assert task.labels == (0, 1) and recipe["seed"] == 0 and {2, 3} <= set(static)
    assert isinstance(dynplan.from_pretrained(tuned).dynplan.planner, UpfrontPlanner)


def test_evaluation_rows(tuned, rows):
    task, recipe, static = load_run(tuned)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model = dynplan.from_pretrained(tuned)
    dataset = encode_rows(rows, task, tokenizer, 16)
    found = evaluate(
        model, plain_model(tuned), static, dataset, task, tokenizer, (1.0, 0.5), seconds=0.01, progress=False
    )
    names = [(row.name, row.budget) for row in found]
    assert names == [
        ("Hugging Face (sdpa)", None),
        ("dynplan keep-all", None),
        ("planner", 1.0),
        ("planner", 0.5),
        ("random path", 0.5),
        ("best fixed subset", 0.5),
    ]
    assert found[0].figures == found[1].figures
    for row in found:
        assert row.sample_layers <= (row.budget or 1) + 1e-6 and row.token_layers <= (row.budget or 1) + 1e-6
        assert set(row.latency_ms) == {"1", "32"} and min(row.latency_ms.values()) > 0
    assert model.dynplan.planner is not None


@pytest.mark.cuda
@requires_cuda
@pytest.mark.parametrize("planner", ["upfront", "stepwise"])
def test_recipe_on_cuda(tiny_model, rows, tmp_path, planner):
    recipe = replace(QUICK, robust_epochs=1, planner=planner)
    folder = tmp_path / "out"
    model = finetune(tiny_model, rows, folder, recipe=recipe, progress=False)
    assert next(model.parameters()).is_cuda and next(model.dynplan.planner.parameters()).is_cuda
    task, _, static = load_run(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = encode_rows(rows, task, tokenizer, 16)
    plain = plain_model(folder).cuda()
    found = evaluate(model, plain, static, dataset, task, tokenizer, (0.5,), seconds=0.01, progress=False)
    assert all(row.token_layers <= (row.budget or 1) + 1e-6 for row in found)


def test_a_fresh_process_predicts_the_same(tuned, rows):
    task, *_ = load_run(tuned)
    batch = make_batches(
        encode_rows(rows[:9], task, AutoTokenizer.from_pretrained(tuned), 16),
        AutoTokenizer.from_pretrained(tuned),
        9,
    )[0]
    batch.pop("labels")
    model = dynplan.from_pretrained(tuned)
    model.dynplan.budget = 0.5
    with torch.no_grad():
        want = model(**batch).logits
    torch.save({key: value for key, value in batch.items()}, tuned / "batch.pt")
    code = (
        "import sys, torch, dynplan\n"
        "model = dynplan.from_pretrained(sys.argv[1]); model.dynplan.budget = 0.5\n"
        "with torch.no_grad(): logits = model(**torch.load(sys.argv[1] + '/batch.pt')).logits\n"
        "torch.save((logits, model.dynplan.last_plan), sys.argv[1] + '/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tuned)], check=True, timeout=300)
    logits, plan = torch.load(tuned / "out.pt")
    assert torch.equal(plan, model.dynplan.last_plan)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)


class InStage(Interrupt):
    def __init__(self, stage, step):
        super().__init__(step)
        self.stage = stage

    def on_step_end(self, args, state, control, **kwargs):
        if self.stage in args.output_dir:
            super().on_step_end(args, state, control, **kwargs)


def test_resumed_equals_uninterrupted(tiny_model, rows, tmp_path):
    """One run is cut in its second robust epoch and again in its second planner epoch."""
    recipe = replace(QUICK, planner_epochs=2)
    whole = finetune(tiny_model, rows, tmp_path / "whole", recipe=recipe, progress=False)
    for cut in (InStage("robust", 6), InStage("planner", 2)):
        with pytest.raises(KeyboardInterrupt):
            finetune(
                tiny_model,
                rows,
                tmp_path / "cut",
                recipe=recipe,
                progress=False,
                callbacks=[cut],
                resume=(tmp_path / "cut").exists(),
            )
    with pytest.raises(InputError, match="resume it or choose another"):
        finetune(tiny_model, rows, tmp_path / "cut", recipe=recipe, progress=False)
    resumed = finetune(tiny_model, rows, tmp_path / "cut", recipe=recipe, progress=False, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in whole.dynplan.planner.state_dict().items():
        assert torch.equal(value, resumed.dynplan.planner.state_dict()[name]), name
    logged = [
        [(line["stage"], line["step"]) for line in map(json.loads, open(tmp_path / run / "metrics.jsonl"))]
        for run in ("whole", "cut")
    ]
    assert sorted(set(logged[0])) == sorted(set(logged[1]))


def half_written(folder, like=None):
    """A folder as a kill leaves it: some of the files, one of them cut."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if like is not None:
        weights = (like / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def test_half_written_folders_are_passed_over(tiny_model, rows, tmp_path):
    """As an earlier version, or another program, may have left them under their final names."""
    recipe = replace(QUICK, plain_epochs=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(tiny_model, rows, whole, recipe=recipe, progress=False)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_model, rows, cut, recipe=recipe, progress=False, callbacks=[InStage("robust", 6)])
    good = next((cut / "robust-checkpoints").glob("checkpoint-*"))
    half_written(cut / "robust-checkpoints" / "checkpoint-9000", good)
    half_written(cut / "robust")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"stage": "robust", "st')
    cut.rename(tmp_path / "moved")  # what checkpoints say about one another moves along
    finetune(tiny_model, rows, tmp_path / "moved", recipe=recipe, progress=False, resume=True)
    for name in ("model.safetensors", "dynplan.safetensors", "dynplan.json", "static.json"):
        assert (tmp_path / "moved" / name).read_bytes() == (whole / name).read_bytes(), name
    assert all(json.loads(line)["stage"] for line in open(tmp_path / "moved" / "metrics.jsonl"))
    assert len(list((tmp_path / "moved" / "robust-checkpoints").iterdir())) <= 2


def test_a_run_is_resumed_under_its_own_settings(tuned, tiny_model, rows, tmp_path):
    recipe = replace(QUICK, plain_epochs=1)

    def refuse(words, model=tiny_model, rows=rows, task="auto", **settings):
        with pytest.raises(InputError, match=f"expected the settings of the run in .*, got .*{words}"):
            finetune(model, rows, tuned, task, replace(recipe, **settings), resume=True, progress=False)

    before = {path: path.stat().st_mtime_ns for path in tuned.iterdir()}
    refuse(r"--menu-size 5 \(it began with 4\)", menu_size=5)
    refuse(r"--batch-size 8 \(it began with 16\), --budgets", batch_size=8, budgets=(0.25,))
    refuse("--train with other rows", rows=rows[:-1])
    refuse(r"--task sst2 \(it began with auto\)", task="sst2")
    (tmp_path / "another").symlink_to(tiny_model)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    refuse(r"--model other \(it began with tiny", model=other)
    assert {path: path.stat().st_mtime_ns for path in tuned.iterdir()} == before


def test_what_cannot_be_trained_leaves_nothing(tiny_model, rows, tmp_path):
    def refuse(words, change=None, rows=rows, drop=(), **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model = shutil.copytree(tiny_model, folder / "model")
        for name in drop:
            (model / name).unlink()
        if change:
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=words):
            finetune(model, rows, folder / "out", recipe=replace(QUICK, **settings), progress=False)
        assert not list((folder / "out").glob("*"))

    refuse("model: expected a folder that can be loaded, .*is_decoder", {"is_decoder": True})
    refuse("model: expected a folder that can be loaded, .*swap: expected one of", {"model_type": "roformer"})
    refuse("model: expected a folder that can be loaded", {"model_type": "no-such-type"})
    refuse(
        "expected weights of the whole encoder in .*, got none for bert.encoder.layer.4",
        {"num_hidden_layers": 5},
    )
    refuse("model: expected a folder that can be loaded", drop=["model.safetensors"])
    refuse(
        "tokenizer: expected one of tokenizer.json.* got none; save",
        {"model_type": "bert"},
        drop=["tokenizer.json", "tokenizer_config.json"],
    )
    refuse(
        r"words that it knows in the rows, got only \[UNK\]",
        rows=[{**row, "sentence1": "xy"} for row in rows],
    )
    refuse("words that it knows in the rows, got only special tokens", max_length=2)
    long = [{**row, "sentence1": "good " * 40} for row in rows]
    refuse(
        "--max-length: expected at most the model's 32 positions, got a row of 42", rows=long, max_length=64
    )


def test_divergence_is_told_in_a_line(tiny_model, rows, tmp_path):
    with pytest.raises(
        InputError, match="robust stage: expected a finite loss, got (nan|inf) at step [0-9]+; try"
    ):
        finetune(
            tiny_model,
            rows,
            tmp_path,
            recipe=replace(QUICK, learning_rate=1e6, robust_epochs=9),
            progress=False,
        )


@pytest.mark.parametrize("name", ["recipe.json", "static.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"task": 1, "1": 5}', '{"a": 1' + "0" * 5000 + "}"]
)
def test_a_damaged_run_is_told_in_a_line(tuned, tmp_path, name, text):
    for file in ("recipe.json", "static.json"):
        shutil.copy(tuned / file, tmp_path)
    (tmp_path / name).write_text(text)
    if (name, text) == ("static.json", "{}"):
        assert load_run(tmp_path)[2] == {}  # no fixed subset is a set of them
        return
    with pytest.raises(InputError, match=f"checkpoint: expected .*{name}[^\n]*$"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("planner", "objective", "kind"),
    [
        ("upfront", "gates", UpfrontPlanner),
        ("upfront", "reward", UpfrontPlanner),
        ("stepwise", None, StepwisePlanner),
    ],
)
def test_other_objectives(tiny_model, rows, tmp_path, planner, objective, kind):
    recipe = replace(QUICK, robust_epochs=1, planner=planner, planner_objective=objective)
    model = finetune(tiny_model, rows, tmp_path / "out", recipe=recipe, progress=False)
    assert isinstance(model.dynplan.planner, kind)
    task, _, _ = load_run(tmp_path / "out")
    model.dynplan.budget = 0.5
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = predict(model, make_batches(encode_rows(rows, task, tokenizer, 16), tokenizer, 8), task)
    assert found.sample_layers <= 0.5 and found.token_layers <= 0.5


def test_pairs_and_regression(tiny_model, rows, tmp_path):
    paired = [{**row, "sentence2": "good w3", "label": row["label"] * 2.5} for row in rows]
    model = finetune(
        tiny_model, paired, tmp_path / "out", recipe=replace(QUICK, robust_epochs=1), progress=False
    )
    assert model.config.num_labels == 1
    assert load_run(tmp_path / "out")[0].metric == "pearson+spearman"


def test_settings_are_checked(tmp_path, tiny_model, rows):
    for settings, words in (
        ({"budgets": (1.5,)}, "budgets within 0..1, got 1.5"),
        ({"planner": "oracle"}, "planner to be one of exits, upfront, stepwise, none, got 'oracle'"),
        (
            {"planner": "upfront", "planner_objective": "luck"},
            "objective to be one of gates, reward, values, got 'luck'",
        ),
        ({"planner": "stepwise", "planner_objective": "reward"}, "objective gates for a stepwise planner"),
        ({"shares": (0.9, 0.4)}, "shares to be rising within 0..1"),
        ({"holdout": 1.0}, "holdout within 0..1, got 1.0"),
        ({"batch_size": 1.5}, "--batch-size to be a whole number within 1..1048576, got 1.5"),
        ({"seed": True}, "--seed to be a whole number"),
        ({"learning_rate": 0.0}, "--learning-rate to be a number above 0"),
    ):
        with pytest.raises(InputError, match=words):
            Recipe(**settings)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a folder that can be written"):
        check_output(tmp_path / "file")
    with pytest.raises(InputError, match="a folder with a Hugging Face model"):
        finetune(tmp_path, rows, tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="rows enough to hold out"):
        finetune(tiny_model, rows[:3], tmp_path / "out2", progress=False)
    with pytest.raises(InputError, match="without recipe.json"):
        load_run(tmp_path)
