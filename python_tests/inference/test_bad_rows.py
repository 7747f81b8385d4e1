"""Rows that cannot be used are named with file and line, or written to a file of their own."""

import pyarrow
import pytest
from inference.conftest import read_lines, write_lines
from pyarrow import parquet

from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run

JSON_LINES = """{"id": "a", "sentence1": "good"}
{"id": "b", "sentence1": 3}
{"id": 7, "sentence1": "bad"}
[1]
{"id": "c", "sentence1": "w1", "sentence2": "w2"}

{"sentence1": "w1"}
{"id": "d", "sentence1": "\\ud800"}
{"id": "e", "sentence1": "w1"}
"""
SAID = {
    2: "expected 'sentence1' to be a string, got int",
    3: "expected 'id' to be a string as in the first row, got a whole number",
    4: "expected a JSON object, got list",
    5: "expected a second sentence in every row or in none",
    7: "expected a column 'id', got 'sentence1'; --key names another",
    8: "expected 'sentence1' to be text, got half a surrogate pair",
}


def settings(model, source, output, **more):
    options = {"window": 3, "workers": 0, "skip_bad": True, **more}
    return RunSettings(ModelSettings(model), (source,), output, InputColumns(key="id"), **options)


def test_json_lines(plain, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(JSON_LINES)
    done = run(settings(plain, source, output), progress=False)
    assert (done.rows, done.bad) == (2, 6)
    assert [row["id"] for row in read_lines(output)] == ["a", "e"]
    bad = read_lines(tmp_path / "out.jsonl.bad.jsonl")
    assert {row["row"]: row["problem"] for row in bad} == SAID
    assert [row["place"] for row in bad] == [f"{source}:{line}" for line in SAID]
    assert bad[0]["content"] == {"id": "b", "sentence1": 3} and bad[2]["content"] == "[1]\n"


@pytest.mark.parametrize("line", SAID)
def test_the_first_one_ends_the_run(plain, tmp_path, line):
    lines = JSON_LINES.splitlines()
    source = tmp_path / "in.jsonl"
    source.write_text(lines[0] + "\n" * (line - 1) + lines[line - 1] + "\n")
    with pytest.raises(InputError) as told:
        run(settings(plain, source, tmp_path / "out.jsonl", skip_bad=False), progress=False)
    assert str(told.value) == f"{source}:{line}: {SAID[line]}; --skip-bad goes on without such rows"
    assert not (tmp_path / "out.jsonl").exists()


def test_csv(plain, tmp_path):
    source, bad = tmp_path / "in.csv", tmp_path / "aside.jsonl"
    text = 'id,sentence1\na,good\nb\nc,"w1\nw2"\nd,"w1"x\ne,\xff\nf,"unclosed\n'
    source.write_bytes(text.encode("latin-1"))
    done = run(settings(plain, source, tmp_path / "out.csv", bad=bad), progress=False)
    assert (done.rows, done.bad) == (2, 4)
    found = {row["place"].rpartition(":")[2]: (row["problem"], row["content"]) for row in read_lines(bad)}
    assert found == {
        "3": ("expected 2 fields as in line 1, got 1", "b\n"),
        "6": ("expected a line of in.csv, got ',' expected after '\"'", 'd,"w1"x\n'),
        "7": ("expected text in UTF-8, got other bytes", "e,\\xff\n"),
        "8": ("expected a line of in.csv, got unexpected end of data", 'f,"unclosed\n'),
    }


def test_keys_that_tsv_cannot_hold(plain, tmp_path):
    source = write_lines(
        tmp_path / "in.jsonl", [{"id": "a", "sentence1": "w1"}, {"id": "b\tc", "sentence1": "w"}]
    )
    with pytest.raises(InputError, match="in.jsonl:2: expected 'id' without tabs and line breaks, which TSV"):
        run(settings(plain, source, tmp_path / "out.tsv", skip_bad=False), progress=False)
    run(settings(plain, source, tmp_path / "out.csv", skip_bad=False), progress=False)


def test_parquet(plain, tmp_path):
    source = tmp_path / "in.parquet"
    rows = [{"id": "a", "sentence1": "good", "extra": 1}, {"id": "b", "sentence1": None, "extra": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    run(settings(plain, source, tmp_path / "out.jsonl"), progress=False)
    assert [row["id"] for row in read_lines(tmp_path / "out.jsonl")] == ["a"]
    (bad,) = read_lines(tmp_path / "out.jsonl.bad.jsonl")
    assert bad["place"] == f"{source}: row 2" and bad["content"] == {"sentence1": None, "id": "b"}


def test_a_damaged_file_is_no_bad_row(plain, tmp_path):
    source = tmp_path / "in.parquet"
    source.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(InputError, match="in.parquet: expected a readable parquet file, got "):
        run(settings(plain, source, tmp_path / "out.jsonl"), progress=False)
