"""`dynplan predict` and `dynplan embed` as a user gives them."""

import json
import shutil

import pytest
import torch
from inference.conftest import make_records, read_lines, write_lines
from test_cli import failure, invoke
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dynplan.policies import KeepAll

RECORDS = make_records(20)


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", RECORDS)


def order(command, model, source, output, *more):
    files = ("--model", model, "--input", source, "--output", output)
    return [command, *files, "--workers", "0", "--window", "8", *more]


def test_predict_under_a_budget(planned, source, tmp_path):
    output = tmp_path / "out.jsonl"
    for budget, layers in (("0.5", 2), ("0.25", 1), ("1", 4)):
        output.unlink(missing_ok=True)
        done = invoke(*order("predict", planned, source, output, "--budget", budget, "--key", "id"))
        assert done.exit_code == 0 and f"20 rows in {output}; 20 of them now, " in done.stderr
        assert {row["layers"] for row in read_lines(output)} == {layers}


def test_bad_rows_and_a_second_time(plain, source, tmp_path):
    source.write_text(source.read_text() + "{}\n")
    output, aside = tmp_path / "out.csv", tmp_path / "aside.jsonl"
    more = ("--skip-bad", "--bad-rows", aside, "--resume")
    done = invoke(*order("predict", plain, source, output, *more))
    assert done.stderr.strip().endswith(f"; 1 rows that could not be used in {aside}")
    assert json.loads(aside.read_text())["row"] == 21
    done = invoke(*order("predict", plain, source, output, *more))
    assert done.exit_code == 0 and done.stderr == f"{output} is whole already: nothing to do\n"


def test_embed_by_other_columns(plain, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_text('n\ta\tb\n1\tgood "w1\tbad\n')
    output = tmp_path / "out.jsonl"
    more = ("--text", "a", "--text-pair", "b", "--key", "n", "--pooling", "cls", "--normalize")
    assert invoke(*order("embed", plain, source, output, *more)).exit_code == 0
    (row,) = read_lines(output)
    assert row["n"] == "1" and sum(x * x for x in row["embedding"]) == pytest.approx(1, abs=1e-5)


def test_what_a_finetuned_folder_says(plain, source, tmp_path):
    """Its labels as they were in training, and the length its rows were cut to."""
    folder = tmp_path / "tuned"
    shutil.copytree(plain, folder)
    said = {"task": {"labels": [3, 7]}, "recipe": {"max_length": 4}}
    (folder / "recipe.json").write_text(json.dumps(said))
    invoke(*order("predict", folder, source, tmp_path / "a.jsonl"))
    invoke(*order("predict", plain, source, tmp_path / "b.jsonl", "--max-length", "4"))
    rows, others = read_lines(tmp_path / "a.jsonl"), read_lines(tmp_path / "b.jsonl")
    assert {row["label"] for row in rows} <= {3, 7}
    assert [row["probability_3"] for row in rows] == [row["probability_poor"] for row in others]


def test_a_score_where_the_model_is_a_regression(plain, source, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        plain, num_labels=1, ignore_mismatched_sizes=True
    )
    folder = tmp_path / "regression"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    invoke(*order("predict", folder, source, tmp_path / "out.jsonl"))
    tokens = AutoTokenizer.from_pretrained(plain)(RECORDS[3]["sentence1"], return_tensors="pt")
    with torch.inference_mode():
        want = float(model.eval()(**tokens).logits)
    assert read_lines(tmp_path / "out.jsonl")[3]["score"] == pytest.approx(want, abs=1e-5)


def test_models_that_cannot_be_used(plain, planned, source, tmp_path, capsys, monkeypatch):
    encoder = plain.parent / "encoder"
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for model, more, words in (
        (nothing, (), "model: expected a folder with a Hugging Face model"),
        (encoder, (), "model: expected a head that was trained in"),
        (
            plain,
            ("--budget", "0.5"),
            f"--budget: expected a model whose policy takes one, got {KeepAll.__name__}",
        ),
    ):
        text, status = failure(
            capsys, monkeypatch, *order("predict", model, source, tmp_path / "out.jsonl", *more)
        )
        assert status == 2 and words in text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text, _ = failure(capsys, monkeypatch, *order("predict", plain, source, tmp_path / "out.jsonl"))
    assert "expected pyarrow to be installed, got none; run: pip install 'dynplan[predict]'" in text
