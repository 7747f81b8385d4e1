"""The study on a tiny encoder: every part is there, a killed one goes on, and its sums are right."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dynplan.commands.study import command as study_command
from dynplan.training import InputError, Recipe, finetune, infer_task
from dynplan.training.metrics import task_metrics
from dynplan.training.study import Study, run_study
from dynplan.training.study_report import read_results, report_lines, summary, write_study_report
from dynplan.training.study_sums import _Gap, _summed, collect, resampled_scores

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
        folder / "data", tiny_model, folder / "out", ("sst2", "stsb"), (0, 1), ("stsb",), (0.5,), (0.75,),
        recipe=recipe, own_subsets=(0.5,), own_tasks=("sst2",), seconds=0.01,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(study):
    return run_study(study, progress=False)


def test_every_part_and_contestant(study, results):
    assert results["parts"] == 3 and results["seeds"] == {"sst2": [0, 1], "stsb": [0]}
    names = {row["name"] for row in results["rows"]}
    exits = {f"{kind} exit" for kind in ("entropy", "patience", "learned", "hash", "random")}
    assert {"planner", "fixed depth", "ordinary", "prefix trained for itself", "distilled student"} < names
    assert exits < names and {row["task"] for row in results["rows"]} == {"sst2", "stsb"}
    planner = [row for row in results["rows"] if row["name"] == "planner" and row["budget"] == 0.5]
    assert len(planner) == 3
    assert all(row["sample_layers"] <= 0.5 and row["latency_ms"]["1"] > 0 for row in planner)
    student = [row for row in results["rows"] if row["name"] == "distilled student"]
    assert [(row["task"], row["sample_layers"]) for row in student] == [("sst2", 0.5)] * 2
    oracle = [row for row in results["rows"] if row["name"].startswith("oracle") and row["task"] == "sst2"]
    assert all(row["sample_layers"] <= 0.5 and not row["latency_ms"] for row in oracle)
    for row in oracle:
        same = [
            one for one in results["rows"] if (one["task"], one["seed"]) == ("sst2", row["seed"])
            and one["budget"] == 0.5 and one["name"] in {"planner", "fixed depth", *exits}
        ]  # fmt: skip
        assert len(same) == 7 and row["score"] >= max(one["score"] for one in same), "it is a bound"
    against = {(row["rival"], row["batch"]): row for row in results["against_rivals"]}
    assert against["fixed depth", 32]["parts"] == 3 and against["entropy exit", 1]["parts"] == 2
    assert set(against["distilled student", 1]["tasks"]) == {"sst2"}
    for row in results["depths"]:
        layers = sum(int(depth) * share for depth, share in row["share"].items())
        assert sum(row["share"].values()) == pytest.approx(1) and layers <= 2 + 16 * 4 / 20
    assert json.loads((study.output / "results.json").read_text()) == json.loads(json.dumps(results))
    text = "\n".join(report_lines(results))
    assert "| sst2 (accuracy) | stsb (pearson+spearman) | mean |" in text and "| ordinary |" in text


def test_a_finished_part_stays_and_a_lost_one_comes_again(study, results):
    kept = (study.output / "stsb-0" / "result.json").stat().st_mtime_ns
    before = (study.output / "sst2-0" / "result.json").read_text()
    (study.output / "sst2-0" / "result.json").unlink()
    shutil.rmtree(study.output / "sst2-0" / "ordinary")
    run_study(study, progress=False)
    assert (study.output / "stsb-0" / "result.json").stat().st_mtime_ns == kept
    said = json.loads((study.output / "sst2-0" / "result.json").read_text())
    assert said["logits"] == json.loads(before)["logits"]


def test_report(study, results, tmp_path):
    shutil.copy(study.output / "results.json", tmp_path / "glue.json")
    results = read_results(tmp_path / "glue.json")
    write_study_report(results | {"source": "glue.json"}, tmp_path / "out.md", "make it")
    text = (tmp_path / "out.md").read_text()
    first = text.split("\n\n")[1]
    assert first == " ".join(summary(results)) and first.startswith("Mean of 2 tasks (sst2, stsb).")
    assert "`make it`" in text and "[glue.json](glue.json)" in text
    for name in ("scores", "tasks", "depths", "paths"):
        assert f"](out/{name}.png)" in text
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for text in ("[]", "{}", "{", json.dumps(results | {"parts": 0})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match="--results: expected results.json of a study"):
            read_results(tmp_path / "other.json")


def gap(points, error=0.5, seeds=None, tasks=()):
    return {"points": points, "standard_error": error, "over_seeds": seeds,
            "tasks": {task: {"points": own, "standard_error": error} for task, own in tasks}}  # fmt: skip


def made(targets=(), against=(), rows=()):
    found = [
        {"batch": 32, "time": time, "share": share, "budget": time, "measured_time": time - 0.01,
         "score": 80.0, "ordinary": 80.0, "reached": share + points / 100,
         "above_target": gap(points, **more)}
        for time, share, points, more in targets
    ]  # fmt: skip
    return {"tasks": ["cola", "rte"], "parts": 2, "targets": found, "against_rivals": list(against),
            "rows": list(rows)}  # fmt: skip


def test_the_first_paragraph_says_what_was_reached_and_what_not():
    text = " ".join(summary(made([
        (0.75, 1.0, 0.2, {}), (0.5, 0.99, -0.4, {}), (0.33, 0.96, -2.0, {}), (0.3, 0.95, -0.7, {"seeds": 0.8})
    ])))  # fmt: skip
    assert "100% of ordinary fine-tuning's score at 75% of the time is reached (100.2% at 74%)" in text
    assert (
        "99% of ordinary fine-tuning's score at 50% of the time is not reached, but within the noise" in text
    )
    assert "96% of ordinary fine-tuning's score at 33% of the time is NOT reached (94.0% at 32%)" in text
    assert "95% of ordinary fine-tuning's score at 30% of the time is not reached, but within" in text
    none = made([(0.75, 1.0, 0.2, {})])
    none["targets"][0]["budget"] = None
    assert "could not be tried, since no budget is as fast" in " ".join(summary(none))


def test_the_first_paragraph_names_rivals_ahead_and_tasks_lost():
    rival = {"rival": "fixed depth", "budget": 0.5, "batch": 32}
    other = {"rival": "entropy exit", "budget": 0.33, "batch": 32}
    against = [
        rival | gap(0.6, tasks=[("cola", 1.6), ("rte", -0.4)]),
        other | gap(-0.3, tasks=[("cola", 0.6), ("rte", -1.2)]),
        other | {"budget": 0.75} | gap(-9),
    ]
    text = " ".join(summary(made([(0.75, 1.0, 0.2, {})], against)))
    assert "the planner is on average above 1 of 2 rivals' points." in text
    assert "It is behind entropy exit at 0.33 by 0.3 ±0.5." in text
    assert (
        "On single tasks it is behind by more than a standard error: rte entropy exit at 0.33 by 1.2" in text
    )
    assert "cola fixed" not in text and "rte fixed" not in text


def test_a_curve_that_falls_is_told():
    def row(budget, score):
        return {"name": "planner", "task": "cola", "budget": budget, "score": score, "stream_score": None}

    targets = [(0.75, 1.0, 0.2, {})]
    rising = summary(made(targets, rows=[row(0.5, 0.7), row(0.75, 0.8)]))
    assert rising[-1] == "The mean score never falls as the budget rises."
    falling = summary(made(targets, rows=[row(0.5, 0.7), row(0.75, 0.66), row(1.0, 0.8)]))[-1]
    assert "falls by 4.00 points at most (from 0.5 to 0.75" in falling


def test_what_the_command_needs():
    with pytest.raises(InputError, match="expected --data, got none"):
        study_command()
    with pytest.raises(InputError, match="expected --report and no --data"):
        study_command(results="results.json", data="data")
    with pytest.raises(InputError, match="--one-seed: expected some of sst2, .*, got 'glue'"):
        study_command("data", "model", "out", one_seed="rte,glue")


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


def test_a_sum_is_of_tasks_and_its_error_of_paired_differences():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    picked = np.random.default_rng(1).integers(0, 400, (500, 400))
    right = [draw.random(400) < p for p in (0.9, 0.7)]
    mine, theirs = (np.eye(2)[np.where(one, labels, 1 - labels)] for one in right)
    draws = [resampled_scores(CLASSES, logits, labels, picked) for logits in (mine, theirs)]
    paired = right[0].astype(float) - right[1]
    gaps = [_Gap("sst2", paired.mean(), draws[0] - draws[1])]
    found = _summed(gaps)
    assert found["points"] == pytest.approx(100 * paired.mean())
    assert found["standard_error"] == pytest.approx(100 * paired.std() / 20, rel=0.15)
    assert found["over_seeds"] is None
    more = _summed([*gaps, _Gap("rte", 0.1, np.zeros(500)), _Gap("rte", 0.3, np.zeros(500))])
    assert more["points"] == pytest.approx((100 * paired.mean() + 20) / 2), "each task counts once"
    assert more["over_seeds"] == pytest.approx(100 * (0.02**0.5 / 2**0.5) / 2)
    assert more["standard_error"] == pytest.approx(found["standard_error"] / 2)


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
    empty = collect(("sst2",), {("sst2", 0): tmp_path / "none"})
    assert empty["parts"] == 0 and empty["against_rivals"] == [] and report_lines(empty)


def test_a_teacher_goes_with_ordinary_fine_tuning(study, rows, tmp_path):
    with pytest.raises(InputError, match="expected a teacher with planner none, got exits"):
        finetune(study.model, rows, tmp_path, recipe=study.recipe, teacher=study.model, progress=False)
