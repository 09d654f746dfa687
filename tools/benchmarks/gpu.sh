#!/bin/sh
# Everything that wants a GPU, in one command, under ten minutes: the tests that no other machine runs,
# then the figures. A part that fails does not stop the others; what it said is in the folder.
cd "$(dirname "$0")/.." || exit 1
out=${1:-benchmarks/results/gpu-$(date +%Y-%m-%d)}
python=${PYTHON:-python}
mkdir -p "$out"
timeout -k 10 230 "$python" -m pytest -q tests/gpu 2>&1 | tee "$out/tests.txt"
timeout -k 10 345 "$python" -m tools.benchmarks.gpu --budget 330 --output "$out" 2>&1 | tee "$out/gpu.txt"
