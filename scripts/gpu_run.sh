#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: build, tests, compute-sanitizer on the kernels,
# benchmarks. Prints one short table last; logs and figures go to $OUT (default build/gpu).
#
# Needs: a Python with a CUDA build of torch 2.11 or newer, pybind11, pytest, hypothesis and transformers (PYTHON,
# default python3), nvcc of the same CUDA release, g++. Downloads nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-build/gpu}")
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if ! gpu=$("$PYTHON" -c '
import sys, torch
if torch.version.cuda is None or not torch.cuda.is_available():
    sys.exit(f"expected a CUDA build of torch that sees a GPU, got torch {torch.__version__}")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""), torch.cuda.get_device_name().replace(" ", "_"))
'); then
  echo "gpu-run: $gpu no GPU to run on" >&2
  exit 1
fi
read -r architecture device <<< "$gpu"
export TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS=${MAX_JOBS:-$(nproc)} DYNPLAN_CUDA=1

table=()
failed=0
# step NAME SECONDS COMMAND...: runs it under a time limit into $OUT/NAME.log and adds a row to the table.
step() {
  local name=$1 limit=$2 begin=$SECONDS status=passed
  shift 2
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || { status="FAILED ($code)"; failed=1; }
  [ $code -ne 124 ] || status="stopped after $limit s"
  # What the step itself says last: pytest's count, the sanitizer's summary.
  local last
  last=$(grep -vE '^\s*$' "$OUT/$name.log" | tail -1 | tr -s '= ' ' ' | cut -c1-60)
  table+=("$(printf '%-12s %-18s %4d s  %s' "$name" "$status" $((SECONDS - begin)) "$last")")
  return $code
}

if step build 240 "$PYTHON" setup.py -q build_ext --inplace; then
  step cuda-tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda python_tests
  # Each allocation its own, so that memcheck sees an access past the end of a tensor.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=dynplan \
      "$PYTHON" scripts/gpu_kernels.py
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  step region 60 "$PYTHON" bench/bench_cuda_region.py --history "$OUT/region.jsonl"
  step dispatch 90 "$PYTHON" bench/bench_cuda_dispatch.py --quick --history "$OUT/dispatch.jsonl"
  step all-tests $((SECONDS < 480 ? 560 - SECONDS : 60)) "$PYTHON" -m pytest -q -p no:cacheprovider -m 'not cuda' python_tests
fi
for name in region dispatch; do cat "$OUT/$name.log" 2>/dev/null; done
echo
echo "dynplan $(cat version.txt) at $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit') on ${device//_/ } (sm_$architecture)"
printf '%s\n' "${table[@]}" | tee "$OUT/summary.txt"
exit $failed
