#!/bin/sh
# The first call on a lent GPU: what is there, what works, where the time goes. At most 480 s.
#
#   benchmarks/gpu_first.sh DIR                          on the machine with the card
#   BATON_GPU_STAND_IN=1 benchmarks/gpu_first.sh DIR     a rehearsal on a CPU
. "$(dirname "$(readlink -f "$0")")/gpu_stages.sh"
session 480 first
probe 20 there there
tests 50 transfer tests/gpu/test_transfer_cuda.py
tests 80 fast tests/gpu/test_fast_cuda.py
probe 60 sdpa sdpa
probe 40 kernel kernel
probe 90 model model
tests 60 cluster tests/gpu/test_cluster_cuda.py -k "pool_is_shared or no_gpu"
probe 32 beside beside
probe 32 beside-mps beside --mps
finish
