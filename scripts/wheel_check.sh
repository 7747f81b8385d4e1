#!/usr/bin/env bash
# Installs a wheel and torch into a new environment, hides every compiler, and runs README's first example, an op of
# each family and `dynplan env` there.
#
#   bash scripts/wheel_check.sh WHEEL TORCH      e.g. dist/dynplan-...whl torch==2.13.0
#
# Environment: PYTHON (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
WHEEL=$(realpath "$1")
TORCH=$2
PYTHON=${PYTHON:-python3}
PLACE=$(mktemp -d)
trap 'rm -rf "$PLACE"' EXIT

"$PYTHON" -m venv "$PLACE/venv"
pip=("$PLACE/venv/bin/python" -m pip --disable-pip-version-check -q)
"${pip[@]}" install "$TORCH"
"${pip[@]}" install "$WHEEL" --only-binary :all:

# A PATH with nothing on it but the environment: no g++, cc, nvcc, ninja.
cp scripts/wheel_check.py "$PLACE"
cd "$PLACE"
env -i PATH="$PLACE/venv/bin" HOME="$PLACE" "$PLACE/venv/bin/python" wheel_check.py
env -i PATH="$PLACE/venv/bin" HOME="$PLACE" "$PLACE/venv/bin/dynplan" env
echo "wheel-check: $(basename "$WHEEL") works with $TORCH"
