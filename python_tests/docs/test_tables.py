"""Figures that come from JSON stand in the pages as the JSON has them; README keeps to its length."""

import re

import pytest
from docs.blocks import ROOT

from scripts.docs import tables


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python scripts/docs/tables.py"


def test_a_changed_figure_is_seen():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    figure = re.search(r"\| \d+\.\d \|", text)[0]
    assert tables.fill(text.replace(figure, "| 9999.9 |", 1)) == text


def test_a_run_that_a_later_one_repeats_is_left_out():
    def row(time, sentences, engine="dynplan"):
        return {
            "time": time,
            "sentences": sentences,
            "engine": engine,
            "model": "small",
            "lengths": "sentences",
            "batch": 1,
            "isa_limit": "native",
        }

    old, more, other, new = row("1", 64), row("2", 128), row("3", 64, "openvino"), row("4", 64)
    assert tables.runs([old, more, other, new]) == [[new], [other], [more]]


def test_readme_is_short_and_shows_what_it_gains_first():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    screen = "\n".join(lines[:40])
    assert (
        "dynplan.swap(model)" in screen and "| **dynplan" in screen and "](docs/demo/tradeoff.png)" in screen
    )
