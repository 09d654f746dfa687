#!/bin/sh
# The GPU tests, which run on no other machine, and then the GPU figures, in under ten minutes.
# A part that fails does not stop the other. Both leave their output in the folder.
cd "$(dirname "$0")/../.." || exit 1
out=${1:-tools/benchmarks/results/gpu-$(date +%Y-%m-%d)}
python=${PYTHON:-python}
mkdir -p "$out"
timeout -k 10 230 "$python" -m pytest -q tests/gpu tests/triton/test_triton_attention.py 2>&1 | tee "$out/tests.txt"
timeout -k 10 345 "$python" -m tools.benchmarks.gpu --budget 330 --output "$out" 2>&1 | tee "$out/gpu.txt"
