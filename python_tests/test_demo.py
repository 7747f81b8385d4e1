"""The demo's data, and the demo itself on a tiny encoder; the real one takes minutes."""

import json

import pytest

from dynplan import demo
from dynplan.training import InputError

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
    rivals = ("fixed depth", "patience exit", "entropy exit", "learned exit")
    assert {("planner", 0.75), *((name, 0.5) for name in rivals)} <= set(names)
    assert results["rows"][3]["stream_score"] is not None
    assert {"report.md", "paths.png", "tradeoff.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
