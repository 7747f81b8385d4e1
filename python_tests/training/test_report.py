import pytest

from dynplan.training import Row, Task, verdict
from dynplan.training.evaluate import best_mixture
from dynplan.training.report import columns, markdown_table

ACCURACY = Task("sst2", "classification", (0, 1), "accuracy")
MATTHEWS = Task("cola", "classification", (0, 1), "matthews")


def rows(task, score, rival):
    figures = {task.metric: score, "score": score}
    return [
        Row("planner", 0.5, figures, 0.5, 0.45, rival_score=rival, latency_ms={"1": 2.0}),
        Row("best fixed subset", 0.5, {task.metric: rival, "score": rival}, 0.5, 0.5, latency_ms={"1": 1.5}),
    ]


@pytest.mark.parametrize(
    ("task", "score", "rival", "words"),
    [
        (ACCURACY, 0.80, 0.75, "the planner beats the best fixed subset"),
        (ACCURACY, 0.75, 0.80, "does NOT beat the best fixed subset: it is worse"),
        (ACCURACY, 0.80, 0.79, "does NOT beat the best fixed subset: the difference is within the noise"),
        # 0.02 is more than a standard error of a proportion of 0.05 would be, not of a correlation.
        (MATTHEWS, 0.05, 0.03, "within the noise"),
    ],
)
def test_verdict_says_it_plainly(task, score, rival, words):
    (sentence,) = verdict(task, rows(task, score, rival), 1000)
    assert words in sentence and "at the same 50% of layers" in sentence


def test_table():
    header, cells = columns(ACCURACY, rows(ACCURACY, 0.8, 0.75))
    assert header == ["policy", "budget", "accuracy", "layers", "work", "ms, batch 1"]
    assert cells[0] == ["planner", "0.5", "0.800", "50%", "45%", "2.00"]
    assert markdown_table(ACCURACY, rows(ACCURACY, 0.8, 0.75)).count("\n") == 3


def test_rivals_may_mix_any_two_subsets():
    curve = {0.0: 0.5, 0.5: 0.55, 0.75: 0.8, 1.0: 0.82}
    assert best_mixture(curve, 0.75) == pytest.approx(0.8)
    # The subset of half the layers is worse than running the larger one on two samples of three.
    assert best_mixture(curve, 0.5) == pytest.approx(0.7)
    assert best_mixture(curve, 1.0) == pytest.approx(0.82) and best_mixture(curve, 0.0) == 0.5
