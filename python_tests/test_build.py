"""What a user meets when the extension cannot be built or loaded: one message, with the remedy."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
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


def test_a_source_distribution_holds_every_source(tmp_path):
    files = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "version.txt"]
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for folder in ("csrc", "dynplan"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("dist/*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files += [str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*") if f.is_file()]
    files += [str(f.relative_to(ROOT)) for f in ROOT.glob("dynplan/**/*.py")]
    files += ["dynplan/_native.pyi", "dynplan/py.typed"]
    assert not set(files) - held


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


WITH_CUDA = """
import json, os, setuptools, sys, torch
from torch.utils import cpp_extension

torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
setuptools.setup = lambda ext_modules, **options: print(json.dumps(vars(ext_modules[0]), default=str))
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__", "__file__": "setup.py"})
"""


def test_what_is_built_where_cuda_is(tmp_path):
    """The extension as torch's own classes describe it, with a toolkit that only pretends."""
    (tmp_path / "dynplan").mkdir()
    for name in ("setup.py", "version.txt", "csrc/sources.txt", "toolkit/bin/nvcc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name) if (ROOT / name).exists() else (tmp_path / name).touch()
    environment = os.environ | {"CUDA_HOME": str(tmp_path / "toolkit"), "DYNPLAN_CUDA": "1"}
    command = [sys.executable, "-c", WITH_CUDA]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extension = json.loads(done.stdout.splitlines()[-1])
    rows = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line[0] != "#"]
    wanted = {f"csrc/{path}" for group, path in rows if group in ("op", "cpu", "cuda")}
    assert set(extension["sources"]) == wanted and any(name.endswith(".cu") for name in wanted)
    assert {"c10_cuda", "torch_cuda", "cudart"} <= set(extension["libraries"])
    assert "torch_python" not in extension["libraries"] and extension["py_limited_api"]
    assert {"-std=c++20", "-O3"} <= set(extension["extra_compile_args"]["nvcc"])
    assert ["DYNPLAN_WITH_CUDA", None] in extension["define_macros"]
    info = json.loads((tmp_path / "dynplan/_build_info.json").read_text())
    assert info["cuda"] == "13.0" and info["torch"] == torch.__version__


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
