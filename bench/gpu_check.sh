#!/usr/bin/env bash
# Checks and measurements on a machine with a GPU, without network: only what is installed there is
# used (torch, pytest, pybind11, and nvcc for the CUDA kernels).
#
#   bench/gpu_check.sh quick      build in place, the GPU tests
#   bench/gpu_check.sh sanitize   the same tests under compute-sanitizer (memcheck, racecheck,
#                                 initcheck)
#   bench/gpu_check.sh bench      benchmarks with their peers; rows into gpu.jsonl, a table last
#
# Results go to $OUT, or bench/results. Every mode ends within nine minutes: what is left over then
# is stopped and reported as such. FASTIS_CUDA=1 makes a missing nvcc an error.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=${1:-quick}
results=${OUT:-bench/results}
limit=530
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
summary=()
failed=0

# step NAME COMMAND...: runs within the time left and notes how it ended.
step() {
  local name=$1 start=$SECONDS left=$((limit - SECONDS)) code outcome
  shift
  echo "== $name: $*"
  if ((left < 5)); then
    code=124
  else
    timeout --kill-after=5 "$left" "$@"
    code=$?
  fi
  case $code in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="FAILED ($code)" ;;
  esac
  ((code == 0)) || failed=1
  summary+=("$(printf '%-28s %6d s  %s' "$name" $((SECONDS - start)) "$outcome")")
  return "$code"
}

# pytest's exit status 5, no test collected, is no failure here.
gpu_tests() {
  "$@" "$python" -m pytest -m "cuda and not slow" -q -p no:cacheprovider
  local code=$?
  ((code == 5)) && echo "no GPU tests yet" && return 0
  return "$code"
}
export -f gpu_tests
export python

build() {
  step "build" "$python" setup.py -q build_ext --inplace &&
    step "configuration" "$python" -c "import fastis; fastis.show_config()"
}

finish() {
  echo
  printf '%s\n' "${summary[@]}"
  exit "$failed"
}

case $mode in quick | sanitize | bench) ;; *)
  echo "usage: bench/gpu_check.sh quick|sanitize|bench, got '$mode'" >&2
  exit 2
  ;;
esac
"$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || {
  echo "torch finds no GPU here" >&2
  exit 2
}
build || finish

case $mode in
  quick)
    step "tests" bash -c gpu_tests
    step "sampling" "$python" bench/bench_gpu_sample.py --quick
    step "training on the GPU" "$python" bench/train.py --device cuda --iterations 300 --seeds 1 \
      --out "$results/quick" --force
    ;;
  sanitize)
    # Without torch's caching allocator every tensor has bounds of its own to overstep.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck; do
      step "$tool" bash -c 'gpu_tests "$@"' _ compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --target-processes all
    done
    ;;
  bench)
    mkdir -p "$results"
    rows=$results/gpu.jsonl
    step "losses" "$python" bench/bench_gpu_loss.py --json "$rows"
    step "sampling" "$python" bench/bench_gpu_sample.py --json "$rows"
    step "a step in one graph" "$python" bench/bench_graph.py --json "$rows"
    step "eager step" "$python" bench/bench_step.py --device cuda --json "$rows"
    step "sampling, CPU" "$python" bench/bench_sample.py --json "$results/cpu.jsonl" --seconds 3
    step "losses, CPU" "$python" bench/bench_loss.py --json "$results/cpu.jsonl"
    step "training" "$python" bench/train.py --device cuda --seeds 3 --out "$results/train"
    ;;
esac
finish
