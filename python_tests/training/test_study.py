"""The study on a tiny encoder: every part is there, a killed one goes on, and its sums are right."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dynplan.training import InputError, Recipe, infer_task
from dynplan.training.metrics import task_metrics
from dynplan.training.study import Study, _bootstrap, collect, report_lines, resampled_scores, run_study

CLASSES = infer_task([{"label": 0}, {"label": 1}], "sst2")


@pytest.fixture(scope="module")
def study(tiny_model, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for task in ("sst2", "stsb"):
        place = folder / "data" / task
        place.mkdir(parents=True)
        for split, part in (("train", rows[:40]), ("dev", rows[40:])):
            lines = [{**row, "label": row["label"] + 0.5} if task == "stsb" else row for row in part]
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    recipe = Recipe(exit_epochs=1, max_length=16, holdout=0.3, batch_size=8, learning_rate=3e-3)
    return Study(
        folder / "data", tiny_model, folder / "out", ("sst2", "stsb"), (0, 1), (0.5,), recipe=recipe,
        own_subsets=(0.5,), seconds=0.01,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(study):
    return run_study(study, progress=False)


def test_every_part_and_contestant(study, results):
    assert results["parts"] == 4
    names = {row["name"] for row in results["rows"]}
    assert {"planner", "fixed depth", "entropy exit", "ordinary"} <= names
    assert "first 2 layers, trained for themselves" in names
    assert {row["task"] for row in results["rows"]} == {"sst2", "stsb"}
    planner = [row for row in results["rows"] if row["name"] == "planner" and row["budget"] == 0.5]
    assert len(planner) == 4
    assert all(row["sample_layers"] <= 0.5 and row["latency_ms"]["1"] > 0 for row in planner)
    against = {(row["rival"], row["batch"]): row for row in results["against_rivals"]}
    assert against["fixed depth", 32]["parts"] == 4 and against["entropy exit", 1]["parts"] == 2
    assert json.loads((study.output / "results.json").read_text()) == json.loads(json.dumps(results))
    text = "\n".join(report_lines(results))
    assert "| policy | budget | batch | sst2 | stsb | mean |" in text and "| ordinary |" in text


def test_a_finished_part_stays_and_a_lost_one_comes_again(study, results):
    kept = (study.output / "stsb-1" / "result.json").stat().st_mtime_ns
    before = (study.output / "sst2-0" / "result.json").read_text()
    (study.output / "sst2-0" / "result.json").unlink()
    shutil.rmtree(study.output / "sst2-0" / "ordinary")
    again = run_study(study, progress=False)
    assert (study.output / "stsb-1" / "result.json").stat().st_mtime_ns == kept
    said = json.loads((study.output / "sst2-0" / "result.json").read_text())
    assert said["logits"] == json.loads(before)["logits"]
    assert again["against_rivals"] == results["against_rivals"]


def test_missing_files_are_named_before_anything_is_trained(study, tmp_path):
    with pytest.raises(InputError, match=r"expected train rows of rte in .*rte \(train.jsonl"):
        run_study(replace(study, tasks=("sst2", "rte"), output=tmp_path), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_malformed_row_names_file_and_line(study, tmp_path):
    shutil.copytree(study.data, tmp_path / "data")
    with open(tmp_path / "data" / "sst2" / "train.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(InputError, match="train.jsonl.*41"):
        run_study(replace(study, data=tmp_path / "data", output=tmp_path / "out"), progress=False)


def test_the_planner_above_a_rival(study):
    """Differences of accuracy, and their standard error: that of a mean of paired differences."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    mine, theirs = (np.eye(2)[np.where(draw.random(400) < p, labels, 1 - labels)] for p in (0.9, 0.7))
    gaps = _bootstrap(CLASSES, mine, theirs, labels)
    paired = (mine.argmax(1) == labels).astype(float) - (theirs.argmax(1) == labels)
    assert abs(gaps.mean() - paired.mean()) < 0.01
    assert gaps.std() == pytest.approx(paired.std() / 20, rel=0.15)


@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc", "stsb"])
def test_resampled_scores_are_the_tasks(name):
    draw = np.random.default_rng(1)
    task = infer_task([{"label": 0.5 if name == "stsb" else value} for value in (0, 1)], name)
    if name == "stsb":
        labels, logits = draw.random(50), draw.random((50, 1))
    else:
        labels, logits = draw.integers(0, 2, 50), draw.random((50, 2))
    picked = draw.integers(0, 50, (6, 50))
    scores = resampled_scores(task, logits, labels, picked)
    for rows, score in zip(picked, scores, strict=True):
        assert score == pytest.approx(task_metrics(task, logits[rows], labels[rows])["score"])


def test_nothing_yet(study, tmp_path):
    empty = collect(replace(study, output=tmp_path))
    assert empty["parts"] == 0 and empty["against_rivals"] == [] and report_lines(empty)
