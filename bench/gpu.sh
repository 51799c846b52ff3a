#!/usr/bin/env bash
# Builds, tests and measures clp_kernels on a machine with a GPU, in one call, offline.
#
#   bench/gpu.sh [RESULTS]        default: bench/results/<date>-<device>
#   PYTHON=python3 bench/gpu.sh   the Python that has torch, triton, setuptools, wheel, ninja, pytest, pytest-benchmark
#
# PYTHON defaults to the checkout's .venv, else python3. The package is installed into PYTHON if that is a virtual
# environment, else into a throw-away one on top of it. Every part runs even if an earlier one failed; each has its log in
# RESULTS, summary.txt lists them, and the exit status is 1 if any failed, 2 if there is no usable GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi
unset TRITON_INTERPRET
# Compiled kernels only: a test that finds no GPU must not fall back to the interpreter unnoticed.
device=$("$PYTHON" -c '
import torch
if not torch.cuda.is_available(): raise SystemExit("torch sees no GPU")
print(torch.cuda.get_device_name(0).replace(" ", "-"))') || {
  echo "gpu.sh: $PYTHON has no torch that sees a GPU" >&2
  exit 2
}
results=${1:-bench/results/$(date +%Y-%m-%d)-$device}
mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
summary=$results/summary.txt
: > "$summary"
failed=0

part() {  # part NAME COMMAND...: runs a command, keeps its output in NAME.log and its verdict in the summary
  local name=$1 start=$SECONDS verdict
  shift
  echo "== $name: $*"
  if "$@" > "$results/$name.log" 2>&1; then verdict=ok; else verdict="FAILED ($?)"; failed=1; fi
  tail -n 15 "$results/$name.log"
  echo "$name $verdict, $((SECONDS - start)) s" | tee -a "$summary"
}

describe() {
  date -u
  uname -a
  if command -v nvidia-smi > /dev/null; then nvidia-smi; fi
  if command -v nvcc > /dev/null; then nvcc --version; fi
  git rev-parse HEAD 2> /dev/null && git status --short
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
}

check_backends() {  # both GPU back-ends where nvcc is there, Triton alone where it is not
  "$PYTHON" - << 'EOF'
import shutil

import clp_kernels

missing = clp_kernels.available_backends()
print(missing)
wanted = ["triton", "cuda"] if shutil.which("nvcc") else ["triton"]
raise SystemExit("; ".join(f"{name}: {missing[name]}" for name in wanted if missing[name] is not None) or 0)
EOF
}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
  part environment "$PYTHON" -m venv --system-site-packages "$results/.venv"
  PYTHON=$results/.venv/bin/python
fi
part machine describe
part build "$PYTHON" -m pip install --verbose --no-index --no-build-isolation --no-deps --editable .
part backends check_backends
pytest=("$PYTHON" -m pytest -o "addopts=--import-mode=importlib --strict-markers" -p no:cacheprovider)
part tests "${pytest[@]}" tests/clp_kernels --benchmark-skip -rs --junitxml="$results/tests.xml"
part benchmarks "${pytest[@]}" bench/bench_*.py --device cuda --benchmark-only --benchmark-json="$results/benchmarks.json"
rm -rf "$results/.venv"
echo "results in $results"
exit "$failed"
