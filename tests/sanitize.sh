#!/usr/bin/env bash
# Builds the CPU extension with the address and undefined-behaviour sanitizers, apart from the installed one, and runs the
# kernel tests on it. PYTHON is an interpreter with the test requirements (make sanitize: the one of .venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
compiler=${CXX:-g++}
build=build/sanitized

CLP_SANITIZE=1 CLP_SKIP_CUDA=1 CXX=$compiler "$python" setup.py --quiet build --build-base "$build" --build-lib "$build/lib"
nm -D "$build/lib/clp_kernels/_cpu.abi3.so" | grep __asan_report > /dev/null ||  # -q would break nm's pipe
    { echo "sanitize: the built object is not instrumented" >&2; exit 1; }

# Python is not instrumented, so the run-time is loaded ahead of it; libstdc++ too, whose exceptions it wraps. What Python
# keeps to its end is no leak. What compiles, or runs in Triton's interpreter, is left out: none of it is in the object.
libraries=$(for name in libasan.so libubsan.so libstdc++.so.6; do printf '%s ' "$("$compiler" -print-file-name=$name)"; done)
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
LD_PRELOAD=$libraries "$python" -m pytest -p no:cacheprovider -o pythonpath="$build/lib . tests" tests/clp_kernels \
    --ignore-glob='*/test_aot*.py' --ignore=tests/clp_kernels/test_cuda_source.py \
    --ignore-glob='*_triton.py' -k "not test_compile" "$@"
