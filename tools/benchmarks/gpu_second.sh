#!/bin/sh
# The second call: large models, fp8, the other cluster tests; at most 230 s. If memory could not be shared
# between processes in the first call (same DIR), the smallest program that shows it, and frames.
#
#   benchmarks/gpu_second.sh DIR                         on the machine with the card
#   BATON_GPU_STAND_IN=1 benchmarks/gpu_second.sh DIR    a rehearsal on a CPU
. "$(dirname "$(readlink -f "$0")")/gpu_stages.sh"
session 230 second
clusters=tests/gpu/test_cluster_cuda.py
large="engine random:qwen2-7b"
[ -n "$quick" ] && large="engine demo"

if ended transfer; then
  figures 100 large --only limits --only "$large"
  figures 40 fp8 --only limits --only fp8
  tests 40 full-pool $clusters -k "full_pool or no_gpu"
  tests 40 copying $clusters -k "copying_ways or no_gpu"
else
  probe 40 ipc ipc
  tests 60 frames $clusters -k "frames and one_gpu or no_gpu"
  figures 100 large --only limits --only "$large"
fi
finish
