#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: build, tests, compute-sanitizer on the kernels,
# benchmarks. Prints one short table last; logs and the table go to $OUT (default build/gpu), figures are appended to
# bench/history/cuda.jsonl.
#
# Needs: a Python with a CUDA build of torch 2.11 or newer, dynplan's dependencies, pybind11, ninja, pytest and
# hypothesis (PYTHON, default python3), nvcc of the same CUDA release, g++. Downloads nothing. The tests that need no
# GPU, some of which need the packages of dynplan[test], run beside the others and end before anything is timed.
#
# Environment: PYTHON, OUT, MAX_JOBS, LIMIT (seconds for all, default 580).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-580}
BENCHES=180 # seconds of it kept for them
OUT=$(realpath -m "${OUT:-build/gpu}")
HISTORY=bench/history/cuda.jsonl
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if ! gpu=$("$PYTHON" -c '
import sys, torch
if torch.version.cuda is None or not torch.cuda.is_available():
    sys.exit(f"expected a CUDA build of torch that sees a GPU, got torch {torch.__version__}")
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""), torch.cuda.get_device_name().replace(" ", "_"))
'); then
  echo "gpu-run: no GPU to run on" >&2
  exit 1
fi
read -r architecture device <<< "$gpu"
export TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS=${MAX_JOBS:-$(nproc)} DYNPLAN_CUDA=1

table=()
failed=0
# row NAME STATUS SECONDS: adds a line to the table, with what the step itself said last (pytest's count, the
# sanitizer's summary).
row() {
  local last
  last=$(grep -vE '^\s*$' "$OUT/$1.log" | tail -1 | tr -s '= ' ' ' | cut -c1-60)
  table+=("$(printf '%-12s %-18s %4d s  %s' "$1" "$2" "$3" "$last")")
}
# verdict CODE SECONDS: sets `status` to what the exit code of a step says.
verdict() {
  case $1 in
    0) status=passed ;;
    124 | 137) status="stopped at $2 s" failed=1 ;;
    *) status="FAILED ($1)" failed=1 ;;
  esac
}
# step NAME SECONDS COMMAND...: runs it into $OUT/NAME.log, as long as it may and the time for all allows.
step() {
  local name=$1 limit=$2 begin=$SECONDS code status
  shift 2
  [ "$limit" -le $((LIMIT - SECONDS)) ] || limit=$((LIMIT - SECONDS))
  if [ "$limit" -le 0 ]; then
    echo "no time left" > "$OUT/$name.log"
    row "$name" "not run" 0
    failed=1
    return 1
  fi
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1
  code=$?
  verdict $code "$limit"
  row "$name" "$status" $((SECONDS - begin))
  return $code
}
# sanitize TOOL
sanitize() {
  if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is neither on PATH nor in the CUDA toolkit" > "$OUT/$1.log"
    row "$1" "not run" 0
    failed=1
    return
  fi
  # API errors are left out: torch itself probes the driver with calls that may fail.
  step "$1" 60 "$sanitizer" --tool "$1" --error-exitcode 9 --report-api-errors no --kernel-regex kns=dynplan \
    "$PYTHON" scripts/gpu_kernels.py
}
tests=("$PYTHON" -m pytest -q -p no:cacheprovider python_tests)

sanitizer=
for candidate in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"; do
  [ -n "$sanitizer" ] || sanitizer=$(command -v "$candidate" || true)
done

if step build 240 "$PYTHON" setup.py -q build_ext --inplace; then
  limit=$((LIMIT - BENCHES - SECONDS)) begin=$SECONDS workers=
  [ $limit -gt 0 ] || limit=1
  ! "$PYTHON" -c 'import xdist' 2> /dev/null || workers="-n 4"
  # shellcheck disable=SC2086 # two words or none
  timeout -k 5 $limit "${tests[@]}" $workers -m 'not cuda' > "$OUT/cpu-tests.log" 2>&1 &
  others=$!
  step cuda-tests 150 "${tests[@]}" -m cuda
  # Each allocation its own, so that memcheck sees an access past the end of a tensor.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize memcheck
  sanitize racecheck
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  wait $others
  verdict $? "$limit"
  row cpu-tests "$status" $((SECONDS - begin))
  step dispatch 120 "$PYTHON" bench/bench_cuda_dispatch.py --quick --history "$HISTORY"
  step region 60 "$PYTHON" bench/bench_cuda_region.py --history "$HISTORY"
fi
for name in region dispatch; do cat "$OUT/$name.log" 2> /dev/null; done
[ ! -f "$HISTORY" ] || cp "$HISTORY" "$OUT/"
echo
commit=$(git rev-parse --short HEAD 2> /dev/null || echo 'no commit')
{
  echo "dynplan $(cat version.txt) at $commit on ${device//_/ } (sm_${architecture/./}), $SECONDS s"
  printf '%s\n' "${table[@]}"
} | tee "$OUT/summary.txt"
exit $failed
