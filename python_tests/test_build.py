"""What a user meets when the extension cannot be built or loaded: one message, with the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynplan
from dynplan import _library, _native

ROOT = Path(__file__).parents[1]


def configure(tmp_path, stub_torch=None, **environment):
    """Runs setup.py up to its checks, with a stand-in torch package where one is given."""
    if stub_torch is not None:
        package = tmp_path / "torch" / "utils"
        package.mkdir(parents=True)
        (tmp_path / "torch" / "__init__.py").write_text(stub_torch)
        (package / "__init__.py").write_text("")
        (package / "cpp_extension.py").write_text("CUDA_HOME = None")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)} | environment
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fake_compiler(tmp_path, version):
    script = tmp_path / "g++-old"
    script.write_text(f'#!/bin/sh\n[ "$1" = -dumpversion ] && echo {version} || echo "g++ {version}"\n')
    script.chmod(0o755)
    return str(script)


def test_missing_torch(tmp_path):
    result = configure(tmp_path, stub_torch="raise ImportError('No module named torch')")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "building needs torch" in result.stderr and "--no-build-isolation" in result.stderr


def test_old_torch(tmp_path):
    result = configure(tmp_path, stub_torch="__version__ = '2.9.1+cpu'")
    assert result.returncode != 0
    assert "expected torch >= 2.11, got 2.9.1+cpu" in result.stderr and "run: pip install" in result.stderr


def test_old_compiler(tmp_path):
    result = configure(tmp_path, CXX=fake_compiler(tmp_path, "9"))
    assert result.returncode != 0
    assert "expected g++ >= 11 for C++20, got g++ 9" in result.stderr and "run: apt-get" in result.stderr


def test_missing_compiler(tmp_path):
    result = configure(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0 and "no C++ compiler: 'no-such-compiler'" in result.stderr


@pytest.mark.parametrize("cuda", ["1", "yes"])
def test_cuda_asked_for_but_not_there(tmp_path, cuda):
    stub = "__version__ = '2.13.0'\nclass version: cuda = '13.0'"
    result = configure(tmp_path, stub_torch=stub, DYNPLAN_CUDA=cuda)
    want = "nvcc was not found" if cuda == "1" else "expected DYNPLAN_CUDA to be auto, 0 or 1, got 'yes'"
    assert result.returncode != 0 and want in result.stderr and "run:" in result.stderr


def test_cuda_asked_for_with_a_cpu_torch(tmp_path):
    stub = "__version__ = '2.13.0+cpu'\nclass version: cuda = None"
    result = configure(tmp_path, stub_torch=stub, DYNPLAN_CUDA="1")
    assert result.returncode != 0 and "torch 2.13.0+cpu is a CPU build" in result.stderr


def test_extension_of_another_torch(monkeypatch):
    monkeypatch.setattr(_library, "build_info", lambda: {"torch": "2.5.1+cpu"})
    with pytest.raises(
        ImportError, match=r"built for torch 2\.5\.1\+cpu, found torch .*\n  run: pip install"
    ):
        _library.load()


def test_extension_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_BUILD_INFO", tmp_path / "nowhere.json")
    with pytest.raises(ImportError, match="the compiled extension is not built\n  run: pip install"):
        _library.load()


def test_build_info():
    assert _library.build_info()["torch"] == torch.__version__
    assert torch.__version__.split("+")[0] in torch.ops.dynplan._build_info()
    assert _native.build_info()["version"] == dynplan.__version__ == _library.build_info()["version"]


@pytest.mark.parametrize("isa", ["baseline", "sse9"])
def test_forced_instruction_set(isa):
    script = "from dynplan import _native; print(_native.cpu_features()['isa'])"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"DYNPLAN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    if isa == "baseline":
        assert result.stdout.strip() == "baseline"
    else:
        assert "expected DYNPLAN_CPU_ISA to be baseline, avx2 or avx512, got sse9" in result.stderr


def test_op_of_newer_sources():
    with pytest.raises(ImportError, match="the op not_there is missing from the extension.*\n  run: pip"):
        _library.find_op("not_there")
