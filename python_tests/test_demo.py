"""The demo's data, and the demo itself on a tiny encoder; the real one takes minutes."""

import json
import warnings
from types import SimpleNamespace

import pytest

from dynplan import demo
from dynplan.training import InputError
from dynplan.training.progress import StageProgress, log_to, say

pytest_plugins = ["training.conftest"]


@pytest.mark.demo
def test_reviews_are_split_without_overlap():
    train, held_out = demo.load_reviews()
    assert len(held_out) == demo.HELD_OUT and len(train) > 7000
    assert not {row["sentence1"] for row in train} & {row["sentence1"] for row in held_out}
    assert 0.45 < sum(row["label"] for row in held_out) / len(held_out) < 0.55
    assert demo.load_reviews()[1] == held_out


def test_a_missing_package_is_named():
    with pytest.raises(InputError, match="package no-such-reviews to be installed; run: pip install"):
        demo.package_folder("no_such_reviews")


def test_a_log_holds_losses_and_warnings(tmp_path, capsys):
    with log_to(tmp_path / "log"):
        shown = StageProgress("exits", progress=False)
        shown.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=40), None)
        shown.on_log(None, SimpleNamespace(global_step=20, max_steps=40), None, logs={"loss": 0.5})
        warnings.warn("odd rows", stacklevel=1)
    say("afterwards", progress=False)
    lines = (tmp_path / "log").read_text()
    assert "INFO exits: 40 steps" in lines and "INFO exits: step 20 of 40, loss 0.5000" in lines
    assert "WARNING" in lines and "odd rows" in lines and "afterwards" not in lines
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="log"), log_to(tmp_path / "none" / "log"):
        pass


def test_demo_replaces_an_earlier_one_and_reports(tiny_model, rows, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.setattr(demo, "package_folder", lambda package: tmp_path)
    monkeypatch.setattr(demo, "load_reviews", lambda: (rows[:40], rows[40:]))
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "recipe.json").write_text("an earlier run")
    demo.run_demo(tmp_path / "out", quick=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [(row["name"], row["budget"]) for row in results["rows"]]
    assert names[:3] == [("Hugging Face (sdpa)", None), ("dynplan keep-all", None), ("planner", 1.0)]
    rivals = ("fixed depth", "patience exit", "entropy exit", "learned exit", "hash exit")
    assert {("planner", 0.75), *((name, 0.5) for name in rivals)} <= set(names)
    assert results["rows"][3]["stream_score"] is not None
    log = (tmp_path / "out" / "demo.log").read_text()
    assert "1 of 3: fine-tune" in log and "exits: epoch 1 of 1, score" in log and "3 of 3: done in" in log
    assert log.index("scores: ") < log.index("latency, batch 1: ") < log.index("latency, batch 32: ")
    assert {"report.md", "paths.png", "tradeoff.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
