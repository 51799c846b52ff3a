#!/usr/bin/env bash
# Builds the wheel in each way that users can, from a clean copy of the tree, and runs it in an empty environment.
# PYTHON is an interpreter with the build requirements (make wheel-smoke: the one of .venv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD
python=$(realpath --no-symlinks "${PYTHON:-python3}")
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n%3ds  %s\n' "$SECONDS" "$*"; }
fail() { printf 'wheel smoke test: %s\n' "$*" >&2; exit 1; }

# A new copy for each build: a build/ folder left by another one puts deleted files back into the wheel.
copy_tree() {
    mkdir -p "$1"
    git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
        if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done | tar --null --files-from=- --create --file=- | tar --extract --file=- --directory="$1"
}

only_wheel() {
    local wheels=("$1"/*)
    [ "${#wheels[@]}" -eq 1 ] || fail "one wheel expected in $1, found: ${wheels[*]}"
    case $(basename "${wheels[0]}") in
        $2) printf '%s\n' "${wheels[0]}" ;;
        *) fail "a wheel named $2 expected, found $(basename "${wheels[0]}")" ;;
    esac
}

run_smoke() (
    mkdir -p "$work/empty"
    cd "$work/empty"
    "$work/venv/bin/python" -I "$repository/tests/wheel_smoke.py" "$@"
)

# No compiler is found on a PATH of the environment's own programs (ninja among them).
without_compiler() { env -u CC -u CXX -u CUDA_HOME PATH="$(dirname "$python")" "$@"; }

step 'build with isolation'
copy_tree "$work/isolated"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work/isolated"
wheel=$(only_wheel "$work/dist" 'clp_engine-*-cp310-abi3-linux_*.whl')

step 'build without isolation'
copy_tree "$work/plain"
# Without the CUDA part: the build above has it where nvcc is found, and it is most of the time.
CLP_SKIP_CUDA=1 "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$work/dist-plain" "$work/plain"
only_wheel "$work/dist-plain" 'clp_engine-*-cp310-abi3-linux_*.whl'

step 'build without a compiler: must fail and name CLP_SKIP_EXTENSION=1'
copy_tree "$work/no-compiler"
if without_compiler "$python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$work/dist-none" \
    "$work/no-compiler" >"$work/no-compiler.log" 2>&1; then
    fail 'the build went through without a compiler'
fi
grep -q 'CLP_SKIP_EXTENSION=1' "$work/no-compiler.log" || {
    tail -n 30 "$work/no-compiler.log" >&2
    fail 'a build without a compiler does not name CLP_SKIP_EXTENSION=1'
}

step 'build without a compiler, CLP_SKIP_EXTENSION=1'
copy_tree "$work/skip"
without_compiler CLP_SKIP_EXTENSION=1 "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$work/dist-skip" "$work/skip"
skip_wheel=$(only_wheel "$work/dist-skip" 'clp_engine-*.whl')

step "install $(basename "$wheel") into an empty environment"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$wheel"
run_smoke --extension
(cd "$work/empty" && "$work/venv/bin/clp" --help >/dev/null && "$work/venv/bin/clp" env)

step "install $(basename "$skip_wheel")"
"$work/venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$skip_wheel"
run_smoke --no-extension

step 'wheel smoke test passed'
