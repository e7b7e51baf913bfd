#!/usr/bin/env bash
# On a machine with a GPU: every check of the GPU kernels, then every figure of docs/results/bench-gpu, in nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python}"
results="${1:-docs/results/bench-gpu}"
started=$SECONDS
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

mkdir -p "$results"
echo "+ pytest tests/gpu"
# Each test waits for a compiler, so there are more of them than a GPU would need.
timeout 200 "$python" -m pytest tests/gpu -q -n "${JOBS:-8}" -p no:cacheprovider | tee "$results/checks.txt"
checked=${PIPESTATUS[0]}

left=$(((540 - (SECONDS - started)) / 60 - 1)) # the last place begun takes up to a minute
echo "+ nmflow bench gpu minutes=$left out=$results"
"$python" -m nmflow bench gpu "minutes=$left" "out=$results" || exit 1
exit "$checked"
