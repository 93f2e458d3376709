#!/usr/bin/env bash
# Checks and measurements on a machine with a GPU, without network, in four calls that each fit into
# a short loan of it:
#
#   bench/gpu_check.sh check      (4 minutes) one launch of every kernel, the GPU tests, the ceilings
#   bench/gpu_check.sh bench      (6) losses and sampling, short; launch geometries; ncu of 4 kernels
#   bench/gpu_check.sh sanitize   (5) tests of the CUDA kernels under compute-sanitizer's memcheck
#   bench/gpu_check.sh full       (9) all benchmarks with their peers, a whole step in one graph
#
# Every step is a process with a time of its own; what it found goes into $OUT (or runs/gpu) as soon
# as it ends. --dry-run goes through the same steps without a GPU. Run bench/gpu_prepare.sh first,
# where there is time: what it makes in carry/ need not be built here. "full" launches by the fastest
# geometries of an earlier "bench" whose bench.json lies in carry/.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" bench/gpu_check.py "$@"
