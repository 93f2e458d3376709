#!/usr/bin/env bash
# Prepares, on a machine without a GPU, what bench/gpu_check.sh need not build where there is one:
# the extension for one architecture, and the Triton kernels of the GPU's tests and benchmarks.
#
#   bench/gpu_prepare.sh          into carry/, which git ignores and which goes along
#
# PYTHON is a Python as on the machine with the GPU, with its releases of torch and Triton
# (any torch serves here, the release of Triton decides); SM its architecture.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.12}
sm=${SM:-90}
"$python" -c "import pybind11, pytest, setuptools, torch, triton" || {
  echo "PYTHON=$python needs torch, triton (3.6.0 for an H200 image with torch 2.11), pybind11," \
    "setuptools and pytest: make a venv and install them" >&2
  exit 2
}
mkdir -p carry
FASTIS_CUDA=1 FASTIS_CUDA_ARCHS=$sm "$python" setup.py -q build_ext \
  --build-lib carry/lib --build-temp "build/carry-$sm"
cp carry/lib/fastis/_C*.so fastis/
"$python" -c "from bench.gpu_check import digest; print(digest())" > carry/sources
export TRITON_CACHE_DIR=$PWD/carry/triton
rm -rf "$TRITON_CACHE_DIR"
mkdir -p "$TRITON_CACHE_DIR"
"$python" bench/gpu_launches.py --sm "$sm" --jobs "${JOBS:-2}" ${MOST:+--most "$MOST"}
# The cache names its files by where they were; the reader puts its own folder there.
pwd > carry/made_in
"$python" -c "import triton; print(triton.__version__)" > carry/triton_version
size=$(du -sm carry | cut -f1)
echo "carry/: $size MiB"
((size < 64)) || { echo "carry/ is too large to go along (64 MiB)" >&2; exit 1; }
