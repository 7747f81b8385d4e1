"""bench/compare_cpu.py: its sums, its referee, and one small comparison from start to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import compare_cpu
import contest
import engines
import workloads
from engines.worker import Run, WorkerError


def make_model(folder):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    return workloads.Model("tiny", folder, hidden=32, intermediate=64, layers=4, heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def samples():
    draw = np.random.default_rng(0)
    return [draw.integers(1, 200, length) for length in (5, 17, 9, 3, 11, 2)]


def test_batches_pad_to_their_own_longest(samples):
    given = workloads.batches(samples, 4)
    assert [batch.ids.shape for batch in given] == [(4, 17), (2, 11)]
    assert given[0].lengths.tolist() == [5, 17, 9, 3]
    np.testing.assert_array_equal(given[0].ids[1], samples[1])
    by_length = workloads.batches(samples, 4, by_length=True)
    assert [batch.lengths.tolist() for batch in by_length] == [[2, 3, 5, 9], [11, 17]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_slices_cover_the_work_once(count):
    parts = workloads.slices(list(range(5)), count)
    assert sum(parts, []) == list(range(5)) and len(parts) == min(count, 5)


def test_operations_count_products_and_attention(model):
    n, h, i = 7, model.hidden, model.intermediate
    products = 2 * n * sum(inner * outer for inner, outer in model.products().values())
    assert model.layer_operations(np.array([n]))[0] == products + 2 * (2 * n * n * h)
    assert model.products()["qkv"] == (h, 3 * h) and model.products()["down"] == (i, h)


def test_sentences_come_from_json_lines_and_plain_text(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"sentence1": "a", "label": 0}\n{"sentence1": "b", "label": 1}\n')
    assert workloads.read_sentences(rows, 1)[0] == ["a"]
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    assert workloads.read_sentences(text, 9)[0] == ["one", "two"]
    with pytest.raises(workloads.InputError, match="--sentences: expected a readable file"):
        workloads.read_sentences(tmp_path / "none.txt", 1)
    with pytest.raises(workloads.InputError, match="model nowhere: expected small, minilm, bert-base"):
        workloads.materialise("nowhere", tmp_path)


def test_break_even_lies_between_measured_shares():
    curve = {1.0: 8.0, 0.5: 4.0, 0.25: 2.0}
    assert compare_cpu.break_even(curve, 6.0) == pytest.approx(0.75)
    assert compare_cpu.break_even(curve, 9.0) == 1.0
    assert compare_cpu.break_even(curve, 1.0) is None


def test_times_are_summed_slice_by_slice():
    contestant = contest.Contestant("dynplan", 1.0, "as given", "fp32", 0.0, slices=2)
    contestant.runs = [[Run(1.0, 10, 1.0, 0.0), Run(3.0, 20, 0.5, 0.1)], [Run(2.0, 10, 1.0, 0.0)] * 2]
    assert contestant.seconds(0.5) == 1.5 + 2.5
    assert contestant.operations == 25


def test_referee_follows_the_plan(model, samples):
    batch = workloads.batches(samples, 6)[0]
    referee = contest.Referee(model)
    plain = BertModel.from_pretrained(model.folder, add_pooling_layer=False).eval()
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
    with torch.inference_mode():
        whole = plain(ids, mask).last_hidden_state[mask.bool()]
        embedded = plain.embeddings(ids)[mask.bool()]
    torch.testing.assert_close(torch.from_numpy(referee.hidden(batch, None)), whole, rtol=1e-4, atol=1e-5)
    nothing = np.zeros((6, 4), dtype=bool)
    torch.testing.assert_close(torch.from_numpy(referee.hidden(batch, nothing)), embedded)


def test_every_engine_tells_what_it_lacks(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    for name in ("onnxruntime", "onnxruntime-int8", "openvino", "ctranslate2"):
        assert engines.engine_class(name).obstacle() == "not installed: pip install dynplan[compare]"
    for name in engines.ENGINES:
        assert issubclass(engines.engine_class(name), engines.Engine)


def test_a_wrong_result_is_not_timed(model, samples):
    class Wrong:
        def call(self, method, share, checked):
            return [(np.zeros((int(batch.mask.sum()), 32), np.float32), None) for batch in checked]

    case = contest.Case(model, "sentences", 6, {"as given": [workloads.batches(samples, 6)]})
    with pytest.raises(WorkerError, match="wrong result: relative error 1.0e"):
        contest._compare(Wrong(), 1.0, case, contest.Referee(model), engines.Engine)


def test_a_comparison_from_start_to_end(model, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would break the reasons into pieces
    orders = {"as given": workloads.slices(workloads.batches(samples, 3), 2)}
    case = contest.Case(model, "sentences", 3, orders)
    monkeypatch.setattr(
        engines.engine_class("ctranslate2"), "obstacle", classmethod(lambda cls: "not installed: as a test")
    )
    rows = compare_cpu.run_case(
        case, contest.Referee(model), ["dynplan", "ctranslate2"], tmp_path, threads=2, rounds=2, patience=0
    )
    assert [row["share"] for row in rows] == [1.0, 0.75, 0.5, 0.25]
    assert [row["kept"] for row in rows] == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=0.1)
    for row in rows:
        assert row["sentences"] == 6 and row["tokens"] == 47
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["error"] < 1e-5 and row["product_peak"] > 0 and row["peak_share"] > 0
    assert "as a test" in capsys.readouterr().out.replace("\n", " ")
    compare_cpu.record(rows, tmp_path / "history.jsonl", source="test", isa_limit="native", threads=2)
    kept = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert kept[0]["engine"] == "dynplan" and kept[0]["commit"] and kept[0]["isa"]


def test_chart_shows_the_latest_run_of_each_case(tmp_path):
    import plot

    case = {
        "model": "m",
        "lengths": "sentences",
        "batch": 1,
        "sentences": 4,
        "order": "as given",
        "threads": 2,
    }
    rows = [
        case
        | {"engine": engine, "share": share, "p50": p50, "isa_limit": isa, "time": time, "foreign": foreign}
        for engine, share, p50, isa, time, foreign in (
            ("dynplan", 1.0, 9.0, "native", "1", 0.0),
            ("dynplan", 1.0, 2.0, "native", "2", 0.1),
            ("hf-sdpa", 1.0, 3.0, "native", "2", 0.0),
            ("hf-eager", 1.0, 8.0, "native", "2", 0.9),
            ("hf-sdpa", 1.0, 5.0, "avx2", "3", 0.0),
        )
    ]
    cases = plot.latest(rows)
    assert plot.latest([row | {"model": "disturbed", "foreign": 0.9} for row in rows]) == {}
    assert [row["p50"] for row in cases["m", "sentences", 1]] == [2.0, 3.0]
    plot.draw(cases, tmp_path / "new" / "chart.png")
    assert (tmp_path / "new" / "chart.png").read_bytes().startswith(b"\x89PNG")
