import gzip
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from dynplan.training.data import (
    InputError,
    LengthGroupedSampler,
    describe_task,
    encode_labels,
    encode_rows,
    infer_task,
    split_rows,
)
from dynplan.training.metrics import task_metrics
from dynplan.training.rows import read_rows


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_plain_and_gzip(tmp_path):
    row = {"sentence1": "é", "label": 1, "idx": 7}
    plain = write(tmp_path / "a.jsonl", json.dumps(row), "", json.dumps({**row, "sentence2": "b"}))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    want = [
        {"sentence1": "é", "sentence2": None, "label": 1},
        {"sentence1": "é", "sentence2": "b", "label": 1},
    ]
    assert read_rows(plain) == read_rows(packed) == want


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected one JSON object a line"),
        ("[1]", "expected a JSON object, got list"),
        ('{"label": 1}', "expected a column 'sentence1', got 'label'; --text names another"),
        ('{"sentence1": null, "label": 1}', "expected 'sentence1' to be a string, got NoneType"),
        ('{"sentence1": "a", "sentence2": 3, "label": 1}', "expected 'sentence2' to be a string, got int"),
        ('{"sentence1": "a"}', "expected a column 'label', got 'sentence1'; --label names another"),
        ('{"sentence1": "a", "label": null}', "expected 'label' to be a number or a string, got NoneType"),
        ('{"sentence1": "a", "label": ""}', "expected 'label' to be a number or a string, got nothing"),
        ('{"sentence1": "a", "label": NaN}', "expected 'label' to be a finite number, got nan"),
        ('{"sentence1": "a", "label": -Infinity}', "expected 'label' to be a finite number, got -inf"),
        ('{"sentence1": "a", "label": 1e400}', "expected 'label' to be a finite number, got inf"),
        (
            '{"sentence1": "a", "label": 1' + "0" * 400 + "}",
            "expected 'label' to be a number of at most 64 bits",
        ),
        ('{"sentence1": "a", "label": 1' + "0" * 5000 + "}", "expected numbers of at most 64 bits"),
        ('{"sentence1": "a", "label": "\\ud800"}', "expected 'label' to be text, got half a surrogate"),
        ('{"sentence1": "\\ud800", "label": 1}', "expected 'sentence1' to be text, got half a surrogate"),
        ("[" * 100_000, "expected one JSON object a line, got too deep a one"),
        ('{"sentence1": "a", "label": true}', "expected 'label' to be a number or a string, got bool"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", '{"sentence1": "a", "label": 1}', line)
    with pytest.raises(InputError, match=f"a.jsonl:2: {words}"):
        read_rows(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="at least one row"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(InputError, match="No such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="readable file"):
        read_rows(write(tmp_path / "a.gz", "not gzip"))


def labelled(*labels):
    return [{"sentence1": "a", "sentence2": None, "label": label} for label in labels]


def test_task_from_labels():
    assert infer_task(labelled(1, 0, 1)).labels == (0, 1)
    assert infer_task(labelled("yes", "no")).labels == ("no", "yes")
    assert infer_task(labelled(1, 2.5)).kind == "regression"
    assert infer_task(labelled(0, 1), "mrpc").metric == "accuracy+f1"
    for bad, name, words in (
        (labelled(0, 1), "glue", "expected one of auto"),
        (labelled("a", "b"), "stsb", "expected numbers"),
        (labelled(0.5, 1), "rte", "expected whole numbers"),
        (labelled(0.5, float("nan")), "auto", "expected finite numbers as labels, got nan"),
        (labelled(1, 1), "auto", "at least two different labels"),
    ):
        with pytest.raises(InputError, match=words):
            infer_task(bad, name)


def test_labels_of_classes_written_as_decimals():
    task = infer_task(labelled(0.0, 1.0), "classification")
    assert task.labels == (0, 1) and encode_labels(labelled(1.0, 0), task) == [1, 0]
    assert "--task classification makes them classes" in describe_task(
        infer_task(labelled(0.0, 1.0)), labelled(0.0, 1.0)
    )
    with pytest.raises(InputError, match="expected all numbers or all strings as labels, got the string '1'"):
        infer_task(labelled(0, 1, "1"))
    with pytest.raises(InputError, match=r"expected a label among \[0, 1\], got 2 in row 2"):
        encode_labels(labelled(1, 2), task)
    with pytest.raises(InputError, match="expected numbers as labels, got 'a' in row 1"):
        encode_labels(labelled("a"), infer_task(labelled(0.5, 1)))


def test_metrics_by_hand():
    classes = infer_task(labelled(0, 1), "mrpc")
    logits = np.array([[0, 1], [1, 0], [0, 1], [0, 1]])
    found = task_metrics(classes, logits, np.array([1, 0, 0, 1]))
    assert found["accuracy"] == 0.75 and found["f1"] == pytest.approx(0.8)
    assert found["matthews"] == pytest.approx(1 / np.sqrt(3))
    assert found["score"] == pytest.approx(0.775)
    scores = infer_task(labelled(0.0, 1.5))
    found = task_metrics(scores, np.array([[1.0], [2.0], [4.0]]), np.array([0.0, 1.0, 9.0]))
    assert found["spearman"] == pytest.approx(1) and 0.9 < found["pearson"] < 1
    assert task_metrics(scores, np.ones((3, 1)), np.array([0.0, 1.0, 9.0]))["score"] == 0
    assert task_metrics(scores, np.ones((1, 1)), np.array([2.0]))["score"] == 0


def test_split_is_a_partition(rows):
    rest, held = split_rows(rows, 0.1, 3)
    assert len(held) == 6 and len(rest) == 54
    assert sorted(map(str, rest + held)) == sorted(map(str, rows))
    assert split_rows(rows, 0.1, 3)[1] == held != split_rows(rows, 0.1, 4)[1]


def test_encoding(tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    task = infer_task(rows)
    dataset = encode_rows(rows, task, tokenizer, 6)
    assert max(dataset.lengths) == 6 and dataset[0]["labels"] == rows[0]["label"]
    with pytest.raises(InputError, match=r"expected a label among \[0, 1\], got 2"):
        encode_rows(labelled(2), task, tokenizer, 6)
    with pytest.raises(InputError, match="in 1 of 2 rows"):
        encode_rows([*rows[:1], {**rows[1], "sentence2": "b"}], task, tokenizer, 6)


def test_batches_hold_like_lengths():
    lengths = [(7 * i) % 31 for i in range(103)]
    sampler = LengthGroupedSampler(lengths, 4, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and first == list(sampler)
    batches = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 100, 4)]
    spans = [max(batch) - min(batch) for batch in batches]
    assert sum(spans) / len(spans) < 3
    sampler.set_epoch(1)
    assert list(sampler) != first
