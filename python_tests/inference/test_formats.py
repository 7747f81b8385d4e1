"""Every format that is read and written holds the same rows, and what comes out is what the model says."""

import csv
import gzip
import json

import numpy as np
import pyarrow
import pytest
import torch
from inference.conftest import make_records, read_lines, write_lines
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run
from dynplan.inference.fields import path_text

RECORDS = make_records(50)
FORMATS = ("jsonl", "csv", "tsv", "jsonl.gz", "csv.zst", "tsv.gz", "jsonl.zst", "parquet")
PACK = {"gz": gzip.compress, "zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)}
UNPACK = {
    "gz": gzip.decompress,
    "zst": lambda data: pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read(),
}


def write(path, records):
    kind, _, packed = path.name.split(".", 1)[1].partition(".")
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
        return path
    if kind == "jsonl":
        write_lines(path, records)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    if packed:
        path.write_bytes(PACK[packed](path.read_bytes()))
    return path


def read(path) -> list[dict]:
    kind, _, packed = path.name.split(".", 1)[1].partition(".")
    if kind == "parquet":
        return parquet.read_table(path).to_pylist()
    data = path.read_bytes()
    lines = (UNPACK[packed](data) if packed else data).decode().splitlines()
    if kind == "jsonl":
        return [json.loads(line) for line in lines]
    return list(csv.DictReader(lines, delimiter="," if kind == "csv" else "\t"))


def settings(model, inputs, output, task="predict", key="id", **more):
    options = {"batch_size": 4, "window": 16, "workers": 0, **more}
    return RunSettings(ModelSettings(model, task), (inputs,), output, InputColumns(key=key), **options)


@pytest.fixture(scope="module")
def expected(plain):
    """What Hugging Face's model gives, row by row."""
    model = AutoModelForSequenceClassification.from_pretrained(plain).eval()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    with torch.inference_mode():
        return torch.cat(
            [model(**tokenizer(row["sentence1"], return_tensors="pt")).logits for row in RECORDS]
        ).softmax(1)


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(plain, expected, tmp_path, kind):
    source, output = write(tmp_path / f"in.{kind}", RECORDS), tmp_path / f"out.{kind}"
    done = run(settings(plain, source, output), progress=False)
    assert (done.rows, done.bad) == (len(RECORDS), 0)
    rows = read(output)
    assert list(rows[0]) == ["id", "label", "probability_poor", "probability_good, or so", "path", "layers"]
    assert [row["id"] for row in rows] == [row["id"] for row in RECORDS]
    found = [[float(row["probability_poor"]), float(row["probability_good, or so"])] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    labels = [("poor", "good, or so")[best] for best in expected.argmax(1).tolist()]
    assert [row["label"] for row in rows] == labels and len(set(labels)) == 2
    assert {(row["path"], int(row["layers"])) for row in rows} == {("0-3", 4)}
    assert [path.name for path in tmp_path.iterdir() if path not in (source, output)] == []


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_numbers_are_the_same_in_every_format(planned, tmp_path, kind):
    source = write(tmp_path / "in.jsonl", RECORDS)
    run(settings(planned, source, tmp_path / f"out.{kind}"), progress=False)
    run(settings(planned, source, tmp_path / "other.tsv"), progress=False)
    rows, others = read(tmp_path / f"out.{kind}"), read(tmp_path / "other.tsv")
    for name in ("probability_poor", "probability_good, or so"):
        found = np.array([row[name] for row in rows], np.float32)
        assert (found == np.array([row[name] for row in others], np.float32)).all()
    assert [row["path"] for row in rows] == [row["path"] for row in others]
    assert {int(row["layers"]) for row in rows} == {2} and len({row["path"] for row in rows}) > 1


@pytest.mark.parametrize("kind", ["jsonl", "tsv.gz", "parquet"])
def test_embeddings(planned, tmp_path, kind):
    source, output = write(tmp_path / "in.jsonl", RECORDS), tmp_path / f"out.{kind}"
    run(settings(planned, source, output, "embed"), progress=False)
    run(settings(planned, source, tmp_path / "other.csv", "embed"), progress=False)
    found = [
        row["embedding"] if "embedding" in row else [row[f"embedding_{i}"] for i in range(16)]
        for row in read(output)
    ]
    others = [[row[f"embedding_{i}"] for i in range(16)] for row in read(tmp_path / "other.csv")]
    assert (np.array(found, np.float32) == np.array(others, np.float32)).all()


def test_keys_and_order_over_many_files(plain, tmp_path):
    """Windows end with their file; a folder gives its files by name, whatever was asked for first stands
    first.
    """
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in (("b", RECORDS[20:43]), ("a", RECORDS[:20])):
        write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / "empty.jsonl", [])
    last = write_lines(tmp_path / "last.jsonl", RECORDS[43:])
    output = tmp_path / "out.jsonl"
    base = settings(plain, folder, output, key=None)
    run(RunSettings(**{**vars(base), "inputs": (last, folder)}), progress=False)
    found = [(row["file"], row["row"]) for row in read_lines(output)]
    sizes = ((last, 7), (folder / "a.jsonl", 20), (folder / "b.jsonl", 23))
    assert found == [(str(path), row) for path, size in sizes for row in range(1, size + 1)]
    lines = {(row["file"], row["row"]): row["label"] for row in read_lines(output)}
    run(settings(plain, folder / "b.jsonl", tmp_path / "b.jsonl"), progress=False)
    assert [lines[str(folder / "b.jsonl"), i + 1] for i in range(23)] == [
        row["label"] for row in read_lines(tmp_path / "b.jsonl")
    ]


def test_a_pattern_and_whole_numbers_as_keys(plain, tmp_path):
    write_lines(tmp_path / "a1.jsonl", [{"n": 5, "sentence1": "good"}])
    write_lines(tmp_path / "a2.jsonl", [{"n": -6, "sentence1": "bad"}])
    run(settings(plain, tmp_path / "a*.jsonl", tmp_path / "out.parquet", key="n"), progress=False)
    assert parquet.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [5, -6]
    assert parquet.read_schema(tmp_path / "out.parquet").field("n").type == pyarrow.int64()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_no_rows_are_an_output_without_rows(plain, tmp_path, kind):
    run(settings(plain, write_lines(tmp_path / "in.jsonl", []), tmp_path / f"out.{kind}"), progress=False)
    assert read(tmp_path / f"out.{kind}") == []


def test_second_sentences_change_what_comes_out(plain, tmp_path):
    rows = [{"id": "a", "sentence1": "good", "sentence2": "w1 w2"}, {"id": "b", "sentence1": "good"}]
    run(settings(plain, write_lines(tmp_path / "pair.jsonl", rows[:1]), tmp_path / "p.jsonl"), progress=False)
    run(settings(plain, write_lines(tmp_path / "one.jsonl", rows[1:]), tmp_path / "o.jsonl"), progress=False)
    pair, one = read_lines(tmp_path / "p.jsonl")[0], read_lines(tmp_path / "o.jsonl")[0]
    assert pair["probability_poor"] != one["probability_poor"]
    model = AutoModelForSequenceClassification.from_pretrained(plain).eval()
    encoded = AutoTokenizer.from_pretrained(plain)("good", "w1 w2", return_tensors="pt")
    with torch.inference_mode():
        want = model(**encoded).logits.softmax(1)[0, 0]
    assert pair["probability_poor"] == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "output", "more", "words"),
    [
        ("none.jsonl", "o.jsonl", {}, "--input: expected a file, a folder of files or a pattern, got "),
        (
            "in.jsonl",
            "o.parquet.gz",
            {},
            "--output: expected .parquet, which is packed inside, got o.parquet.gz",
        ),
        ("in.jsonl", "in.jsonl", {}, "--output: expected no file of that name, got .*in.jsonl"),
        ("in.jsonl", "o.jsonl", {"key": "label"}, "--key: expected a name that no column .* got 'label'"),
        ("in.jsonl", "o.jsonl", {"key": "no"}, "in.jsonl:1: expected a column 'no', got 'id', .*--key names"),
        (
            "in.jsonl",
            "o.jsonl",
            {"max_length": 33},
            "--max-length: expected at most the model's 32 positions",
        ),
        ("in.jsonl", "o.jsonl", {"batch_size": 0}, "--batch-size: expected a whole number from 1, got 0"),
        ("in.jsonl", "no/o.jsonl/a", {}, "--output: expected a place to write to"),
    ],
)
def test_what_cannot_be_used_is_named(plain, tmp_path, inputs, output, more, words):
    write_lines(tmp_path / "in.jsonl", [{**record, "label": "x"} for record in RECORDS])
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "o.jsonl").write_text("")
    with pytest.raises(InputError, match=words):
        run(settings(plain, tmp_path / inputs, tmp_path / output, **more), progress=False)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("path", "text"),
    [([], ""), ([0], ""), ([1], "0"), ([1, 1, 1, 0, 0, 1, 0, 1, 1], "0-2,5,7-8"), ([1] * 12, "0-11")],
)
def test_paths_as_text(path, text):
    assert path_text(path) == text
