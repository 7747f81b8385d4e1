#!/usr/bin/env bash
# Compiles every `cuda` row of csrc/sources.txt to objects for sm_80 and sm_90a, without a GPU and against any build
# of torch, CPU builds included; writes what each kernel needs of the chip to build/cuda/resources.txt and fails where
# a kernel of scripts/cuda_hot_kernels.txt spills registers to memory.
#
# Environment: PYTHON (a Python that has torch), NVCC, JOBS. Where no nvcc 13 is found, one is installed with pip into
# build/cuda-toolkit (270 MB).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-2}
OUT=build/cuda
TOOLKIT=build/cuda-toolkit
ARCHITECTURES=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a)
WHEELS=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)

stop() { echo "cuda-check: $1" >&2; exit 1; }

# nvcc 13 knows sm_80 and sm_90a; CUDA 12's does too, but torch 2.11 and newer build with 13.
is_usable() { [ -x "$1" ] && "$1" --version 2>/dev/null | grep -q 'release 13\.'; }

find_nvcc() {
  local candidate
  for candidate in "${NVCC:-}" "$(command -v nvcc || true)" "${CUDA_HOME:-/nonexistent}/bin/nvcc" \
                   /usr/local/cuda/bin/nvcc "$PWD/$TOOLKIT/nvidia/cu13/bin/nvcc"; do
    if is_usable "$candidate"; then echo "$candidate"; return; fi
  done
}

nvcc=$(find_nvcc)
if [ -z "$nvcc" ]; then
  echo "cuda-check: no nvcc 13 on PATH, in CUDA_HOME or in /usr/local/cuda; installing one into $TOOLKIT"
  "$PYTHON" -m pip install -q --no-deps --target "$TOOLKIT" "${WHEELS[@]}" ||
    stop "expected nvcc 13, got none. Run: pip install --no-deps --target $TOOLKIT ${WHEELS[*]}
  or install the package cuda-nvcc-13-0 (apt, NVIDIA's repository) and put its bin folder on PATH"
  nvcc=$(find_nvcc)
  [ -n "$nvcc" ] || stop "the nvcc in $TOOLKIT does not run"
fi

includes=$("$PYTHON" -c 'from torch.utils.cpp_extension import include_paths
print("\n".join(path for path in include_paths() if "torch" in path))') ||
  stop "expected a Python with torch, got PYTHON=$PYTHON (run: make .venv/.torch, or set PYTHON)"
FLAGS=(-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC -Icsrc -DAT_PER_OPERATOR_HEADERS -DDYNPLAN_WITH_CUDA
       -DC10_USING_CUSTOM_GENERATED_MACROS -Xptxas -v "${ARCHITECTURES[@]}"
       # as torch.utils.cpp_extension has it
       -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__
       -D__CUDA_NO_HALF2_OPERATORS__)
while read -r path; do FLAGS+=(-isystem "$path"); done <<< "$includes"

mkdir -p "$OUT"
awk '$1 == "cuda" { print $2 }' csrc/sources.txt > "$OUT/sources"
stem() { echo "$1" | sed 's|^ops/cuda/||; s|[/.]|_|g'; }

compile() {
  local source=$1 name
  name=$(stem "$source")
  local object=$OUT/$name.o log=$OUT/$name.ptxas
  if [ -f "$object" ] && [ -z "$(find csrc scripts/cuda_check.sh -type f -newer "$object" -print -quit)" ]; then
    return 0
  fi
  local begin=$SECONDS
  if ! "$nvcc" "${FLAGS[@]}" -c "csrc/$source" -o "$object" > "$log" 2>&1; then
    rm -f "$object"
    grep -v '^ptxas info' "$log" >&2
    echo "cuda-check: csrc/$source does not compile" >&2
    return 1
  fi
  grep -E '(warning|#[0-9]+-D)' "$log" >&2 || true
  echo "cuda-check: csrc/$source compiled for sm_80 and sm_90a in $((SECONDS - begin)) s"
}

failed=0
while read -r source; do
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || failed=1; done
  compile "$source" &
done < "$OUT/sources"
while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done
[ "$failed" -eq 0 ] || stop "not every CUDA source compiles"

logs=()
while read -r source; do logs+=("$OUT/$(stem "$source").ptxas"); done < "$OUT/sources"
"$PYTHON" scripts/cuda_resources.py scripts/cuda_hot_kernels.txt "$OUT/resources.txt" "${logs[@]}"
