"""Files of every kind give the same rows, and what cannot be read is named with file and line."""

import csv
import gzip
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from dynplan.errors import InputError
from dynplan.training.data import encode_labels, infer_task
from dynplan.training.rows import Columns, read_rows

COLUMNS = Columns("review", "title", "stars")
RECORDS = [
    {"id": "7", "review": 'she said "no",\nthen left', "title": "é", "stars": 1},
    {"id": "8", "review": "fine", "title": "", "stars": 0},
]
ROWS = [
    {"sentence1": record["review"], "sentence2": record["title"], "label": record["stars"]}
    for record in RECORDS
]


def as_csv(place):
    with open(place, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, RECORDS[0])
        writer.writeheader()
        writer.writerows(RECORDS)


def as_tsv(place):
    lines = ["\t".join(RECORDS[0])]
    lines += ["\t".join(str(value) for value in record.values()).replace("\n", " ") for record in RECORDS]
    place.write_bytes("\r\n".join(lines).encode())


def as_json_lines(place):
    place.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.csv", as_csv), ("a.TSV", as_tsv), ("a.jsonl", as_json_lines), ("a", as_json_lines)],
)
def test_every_format(tmp_path, name, write):
    place = tmp_path / name
    write(place)
    want = json.loads(json.dumps(ROWS).replace("\\n", " ")) if name == "a.TSV" else ROWS
    assert read_rows(place, COLUMNS) == want
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(place.read_bytes()))
    assert read_rows(packed, COLUMNS) == want


def test_parquet(tmp_path, monkeypatch):
    place = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), place)
    assert read_rows(place, COLUMNS) == ROWS
    for name, pack in ((".gz", gzip.compress), (".zst", pyarrow.Codec("zstd").compress)):
        packed = tmp_path / f"a.parquet{name}"
        packed.write_bytes(pack(place.read_bytes()))
        assert read_rows(packed, COLUMNS) == ROWS
    with pytest.raises(InputError, match="a.parquet: row 1: expected a column 'text', got 'id', 'review', "):
        read_rows(place, Columns("text"))
    place.write_bytes(b"damaged bytes")
    with pytest.raises(
        InputError,
        match="expected a readable parquet file, got Parquet magic bytes not found in footer[^\n]+$",
    ):
        read_rows(place)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InputError, match="a.parquet: expected pyarrow to be installed; run: pip install pyarrow"
    ):
        read_rows(place)


def test_zstd(tmp_path):
    place, lines = tmp_path / "a.jsonl.zst", "".join(json.dumps(record) + "\n" for record in RECORDS)
    packed = pyarrow.Codec("zstd").compress(lines.encode(), asbytes=True)
    place.write_bytes(packed + packed)
    assert read_rows(place, COLUMNS) == ROWS + ROWS
    for body in (packed[:-5], packed[: len(packed) // 2], packed + b"trailing", b"not zstd"):
        place.write_bytes(body)
        with pytest.raises(
            InputError, match="a.jsonl.zst: expected a readable file of JSON lines, got [^\n]+$"
        ):
            read_rows(place, COLUMNS)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"sentence1": "a", "label": 1}\n{"sentence1": "\xff", "label": 1}\n')
    (tmp_path / "a.csv").write_bytes(b"sentence1,label\n\xff,1\n")
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(InputError, match=f"{name}:2: expected text in UTF-8, got "):
            read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "id,text\n1,a\n", "a.csv:2: expected a column 'sentence1', got 'id', 'text'; --text names"),
        ("a.csv", "sentence1,label\na,1\nb\n", "a.csv:3: expected 2 fields as in line 1, got 1"),
        ("a.csv", "sentence1,label\na,1,2\n", "a.csv:2: expected 2 fields as in line 1, got 3"),
        ("a.csv", "label,label\n1,2\n", "a.csv:1: expected columns of different names, got 'label', 'label'"),
        (
            "a.csv",
            'sentence1,label\n"a,1\nb,2\n',
            "a.csv:3: expected a line of a.csv, got unexpected end of data",
        ),
        (
            "a.csv",
            "sentence1,label\n" + "a" * 200_000 + ",1\n",
            "a.csv:2: expected .* field larger than field",
        ),
        ("a.csv", "sentence1,label\n", "a.csv: expected at least one row, got none"),
        ("a.csv", "", "a.csv: expected at least one row, got none"),
        (
            "a.tsv",
            "sentence1\tlabel\na\t0.5\nb\tnan\n",
            "a.tsv:3: expected 'label' to be a finite number, got nan",
        ),
        (
            "a.tsv",
            "sentence1\tlabel\na\t\n",
            "a.tsv:2: expected 'label' to be a number or a string, got nothing",
        ),
        (
            "a.jsonl",
            '{"sentence1": "a", "text": 1}\n',
            "a.jsonl:1: expected a column 'label', got 'sentence1', 't",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_rows(tmp_path / name)


def test_a_second_sentence_that_is_named_must_be_there(tmp_path):
    (tmp_path / "a.csv").write_text("sentence1,label\na,1\n")
    assert read_rows(tmp_path / "a.csv")[0]["sentence2"] is None
    with pytest.raises(
        InputError, match="expected a column 'premise', got 'sentence1', 'label'; --text-pair"
    ):
        read_rows(tmp_path / "a.csv", Columns(pair="premise"))


def test_damaged_gzip_is_told_in_a_line(tmp_path):
    good = gzip.compress(b'{"sentence1": "a", "label": 1}\n' * 1000, mtime=0)
    for body in (good[:-12], good[:20] + bytes(20) + good[40:], good[:-8] + bytes(8), b"not gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(body)
        with pytest.raises(
            InputError, match="a.jsonl.gz: expected a readable file of JSON lines, got [^\n]+$"
        ):
            read_rows(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (["0", "1"], [0, 1]),
        (["-1", " 2"], [-1, 2]),
        (["0", "1.0"], [0.0, 1.0]),
        ([".5", "1e-3"], [0.5, 0.001]),
        (["0", "maybe"], ["0", "maybe"]),
        (["nan", "eng"], ["nan", "eng"]),
        (["1_000", "2"], ["1_000", "2"]),
    ],
)
def test_labels_of_files_without_types(tmp_path, labels, want):
    (tmp_path / "a.csv").write_text("sentence1,label\n" + "".join(f"a,{label}\n" for label in labels))
    found = [row["label"] for row in read_rows(tmp_path / "a.csv")]
    assert found == want and [type(label) for label in found] == [type(label) for label in want]


def test_string_labels_that_look_like_numbers(tmp_path):
    """A file to be scored may hold only those of the labels that are digits."""
    (tmp_path / "train.csv").write_text("sentence1,label\na,1\nb,none\n")
    (tmp_path / "eval.csv").write_text("sentence1,label\na,1\n")
    task = infer_task(read_rows(tmp_path / "train.csv"))
    assert task.labels == ("1", "none") and encode_labels(read_rows(tmp_path / "eval.csv"), task) == [0]
