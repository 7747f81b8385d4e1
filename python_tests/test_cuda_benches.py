"""The GPU benches and scripts where there is no GPU; tiny sizes."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from integrations.test_capture import RerunGraph
from PIL import Image

from dynplan import cuda_graph as capturing
from dynplan.benchmarking import Timing

sys.path.append(str(Path(__file__).parents[1] / "bench"))
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_cuda_dispatch as bench
import bench_cuda_products as products
import bench_cuda_region as region
import gpu_kernels
from bars import Bar


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
    assert printed.splitlines()[-1].endswith("of 6 bars met")
    assert "not measured  keep-all at batch 128" in printed
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    forms = {row["impl"] for row in rows if row["op"] == "cuda_dispatch"}
    shared = {"hf sdpa", "hf sdpa graph", "unpadded", "unpadded graph", "dynplan 0.0"}
    shares = {f"{kind} {share}" for kind in ("naive", "dynplan") for share in bench.SHARES}
    assert forms == shared | shares | (set() if "--quick" in extra else {"hf compiled"})
    assert len([row for row in rows if row["op"] == "cuda_dispatch_bar"]) == 6


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


@pytest.fixture
def region_on_cpu(monkeypatch, one_thread):
    monkeypatch.setattr(region, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(region, "recorded", lambda call: call)
    monkeypatch.setattr(region, "COPY_BYTES", 1 << 16)
    monkeypatch.setitem(region.SHAPES, "cityscapes", (1, 3, 20, 40))


def test_region_bench_from_start_to_end(region_on_cpu, tmp_path, capsys):
    history, picture = tmp_path / "history.jsonl", tmp_path / "labels.png"
    Image.fromarray((np.arange(80 * 50).reshape(50, 80) // 1000 * 40).astype(np.uint8)).save(picture)
    region.main(["--shapes", "cityscapes", "--rounds", "1", "--map", str(picture), "--history", str(history)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("of 4 bars met")
    assert "PASS          cityscapes, region 5, float32, in us" in printed.replace("FAIL", "PASS")
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    timed = [row for row in rows if row["op"] == "region_cross_entropy"]
    assert {row["shape"] for row in timed} == {f"cityscapes {kind}" for kind in ("scene", "noise", "map")}
    assert {row["impl"] for row in timed} == {"cross-entropy", "region 3", "region 5", "region 7"}
    assert len(timed) == 3 * 2 * 4 and len(rows) == len(timed) + 4


def test_products_bench_from_start_to_end(on_cpu, tmp_path, monkeypatch, capsys):
    forced = []

    def times(call, name, rounds):
        assert call().shape == (100, 32) and name == "product_kernel"
        forced.append(os.environ.get("DYNPLAN_CUDA_TILE"))
        return [1e-6, 2e-6, 3e-6, 4e-6]

    monkeypatch.setattr(products, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(products, "MODELS", bench.MODELS)
    monkeypatch.setattr(products, "kernel_times", times)
    monkeypatch.setattr(products, "kernel_seconds", lambda call, name: 2e-6 * len(call()) / 100)
    history = tmp_path / "history.jsonl"
    products.main(["--models", "bert-base", "--active", "100", "--rounds", "1", "--history", str(history)])
    assert forced == [None, *products.TILES] and "DYNPLAN_CUDA_TILE" not in os.environ
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["shape"].split()[1] for row in rows] == list(products.PRODUCTS)
    assert all(set(row["tiles"]) == set(products.TILES) for row in rows)
    assert "0.67" in capsys.readouterr().out  # 2 us through PyTorch, 3 us here


def test_products_bench_knows_the_kernels_tiles():
    header = Path(__file__).parents[1] / "csrc/kernels/encoder/cuda/kernels.h"
    (names,) = re.findall(r"kProductTiles\[\] = \{(.*?)\};", header.read_text(), re.DOTALL)
    assert tuple(re.findall(r'"(\w+)"', names)) == products.TILES


def test_label_map_keeps_regions(region_on_cpu, tmp_path):
    values = np.repeat(np.array([[7, 200], [7, 90]], np.uint8), 8, 0).repeat(8, 1)
    Image.fromarray(values).save(tmp_path / "labels.png")
    found = region.label_map(tmp_path / "labels.png", (2, 5, 4, 8))
    wanted = torch.tensor([[0, 2], [0, 1]]).repeat_interleave(2, 0).repeat_interleave(4, 1)
    assert torch.equal(found, wanted.expand(2, -1, -1))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colours.png")
    with pytest.raises(SystemExit, match="--map: expected grey values or a palette, got mode RGB"):
        region.label_map(tmp_path / "colours.png", (2, 5, 4, 8))


def test_a_wrong_region_loss_is_not_timed(region_on_cpu, monkeypatch):
    monkeypatch.setattr(region, "region_cross_entropy", lambda *_, **__: torch.ones((), requires_grad=True))
    with pytest.raises(AssertionError):
        region.main(["--shapes", "cityscapes"])


def test_bars_tell_met_from_missed():
    assert Bar("share", 0.56, 0.56).verdict == "PASS"
    assert Bar("share", 0.57, 0.56).verdict == "FAIL"
    assert Bar("rate", 0.71, 0.7, least=True).verdict == "PASS"
    assert Bar("rate", None, 0.7, least=True).verdict == "not measured"


def test_plans_have_their_share():
    generator = torch.Generator().manual_seed(0)
    for share in bench.SHARES:
        plan = bench.random_plan(50, share, generator)
        assert (plan.sum(1) == round(12 * share)).all()
        assert share == 1 or not (plan == plan[0]).all()
    for kind, low, high in (("sst2", 4, 55), ("64-128", 64, 128), ("512", 512, 512)):
        lengths = bench.lengths_of(kind, 200, generator)
        assert lengths.min() >= low and lengths.max() <= high


@pytest.mark.parametrize("which", [bench, products, region], ids=lambda module: module.__name__)
def test_without_a_gpu_it_says_so(monkeypatch, which):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"{which.__name__}: expected a CUDA device"):
        which.main([])


def test_every_kernel_of_the_sanitizer_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_kernels, "ENCODER_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_kernels.main()
    assert capsys.readouterr().out == "every kernel ran\n"
