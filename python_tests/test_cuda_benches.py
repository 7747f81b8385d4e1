"""bench_cuda_dispatch.py and the GPU session's scripts where there is no GPU; tiny sizes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from integrations.test_capture import RerunGraph

from dynplan.benchmarking import Timing
from dynplan.integrations import capture as capturing

sys.path.append(str(Path(__file__).parents[1] / "bench"))
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_cuda_dispatch as bench
import gpu_kernels


def attend(query, key, value, offsets, *_):
    """Stands for torch.nn.attention.varlen.varlen_attn, which needs a GPU."""
    parts = [
        F.scaled_dot_product_attention(*(x[begin:end].transpose(0, 1) for x in (query, key, value)))
        for begin, end in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)
    ]
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.fixture
def on_cpu(monkeypatch, one_thread):
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench, "recorded", lambda call: call)
    monkeypatch.setattr(bench, "LAYERS", 4)
    monkeypatch.setattr(bench, "ENOUGH_TOKENS", 64)
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    monkeypatch.setattr(bench, "MODELS", {"bert-base": sizes})
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(capturing, "_why_not", lambda device: None)
    monkeypatch.setattr(capturing, "Graph", RerunGraph)


@pytest.mark.parametrize("extra", [["--quick"], ["--lengths", "sst2", "64-128"]])
def test_dispatch_bench_from_start_to_end(on_cpu, tmp_path, capsys, extra):
    history = tmp_path / "history.jsonl"
    arguments = ["--batches", "2", "--rounds", "1", "--models", "bert-base", "--history", str(history)]
    bench.main([*extra, *arguments])
    printed = capsys.readouterr().out
    assert "bert-base 2x64-128" in printed and "break-even" in printed
    assert printed.splitlines()[-1].endswith("of 5 bars met")
    assert "not measured  keep-all at batch 128" in printed
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    forms = {row["impl"] for row in rows if row["op"] == "cuda_dispatch"}
    shared = {"hf sdpa", "hf sdpa graph", "unpadded", "unpadded graph", "dynplan 0.0"}
    shares = {f"{kind} {share}" for kind in ("naive", "dynplan") for share in bench.SHARES}
    assert forms == shared | shares | (set() if "--quick" in extra else {"hf compiled"})
    assert len([row for row in rows if row["op"] == "cuda_dispatch_bar"]) == 5


def test_a_wrong_result_is_not_timed(on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "unpadded", lambda model, inputs, lengths: lambda: torch.zeros(2, 128, 32))
    monkeypatch.setattr(bench, "lengths_of", lambda kind, size, generator: torch.full((size,), 128))
    with pytest.raises(AssertionError, match="expected unpadded to be within"):
        bench.main(["--quick", "--batches", "2", "--history", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_break_even_lies_where_the_times_meet():
    def timings(rival, *ours):
        points = {f"dynplan {share}": time for share, time in zip((*bench.SHARES, 0.0), ours, strict=True)}
        return {name: Timing(time, time, time, 1) for name, time in ({"rival": rival} | points).items()}

    assert bench.break_even(timings(9, 8, 6, 4, 2, 1), "rival") == 1
    assert bench.break_even(timings(5, 8, 6, 4, 2, 1), "rival") == 0.625
    assert bench.break_even(timings(0.5, 8, 6, 4, 2, 1), "rival") is None


def test_bars_tell_met_from_missed():
    assert bench.Bar("share", 0.56, 0.56).verdict == "PASS"
    assert bench.Bar("share", 0.57, 0.56).verdict == "FAIL"
    assert bench.Bar("rate", 0.71, 0.7, least=True).verdict == "PASS"
    assert bench.Bar("rate", None, 0.7, least=True).verdict == "not measured"


def test_plans_have_their_share():
    generator = torch.Generator().manual_seed(0)
    for share in bench.SHARES:
        plan = bench.random_plan(50, share, generator)
        assert (plan.sum(1) == round(12 * share)).all()
        assert share == 1 or not (plan == plan[0]).all()
    for kind, low, high in (("sst2", 4, 55), ("64-128", 64, 128), ("512", 512, 512)):
        lengths = bench.lengths_of(kind, 200, generator)
        assert lengths.min() >= low and lengths.max() <= high


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="bench_cuda_dispatch: expected a CUDA device"):
        bench.main(["--quick"])


def test_every_kernel_of_the_sanitizer_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_kernels, "ENCODER_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_kernels.main()
    assert capsys.readouterr().out == "every kernel ran\n"
