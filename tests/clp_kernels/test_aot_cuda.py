"""Every CUDA kernel, compiled by nvcc for sm_80 and sm_90a: no spill, tensor cores, 16 bytes at a time.

Of `make test-aot` (--launches=all); `make test` looks at what was built (test_cuda_source, test_cuda_segments). The
cubins stay in build/aot by the hash of sources, flags and compiler.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_binaries
import pytest
from tests_support import load_setup

ROOT = Path(__file__).parents[2]
KNOWN = json.loads(Path(__file__).with_name("aot_known.json").read_text())
CUBINS = ROOT / "build/aot"
NVCC = shutil.which("nvcc")
HOPPER_ALONE = "_sm90.cu"  # sources whose instructions no other architecture has
Functions = dict[str, tuple[dict[str, int], "Counter[str]"]]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: the CUDA kernels are not compiled")


def compile_source(source: Path, architecture: str) -> Path:
    """The cubin of one source, compiled with the flags of the extension unless it is there."""
    setup = load_setup()
    flags = f"{setup.cuda_flags()} {setup.include_flags()} -cubin -arch={architecture}"
    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{flags} {version}".encode())
    for path in [source, *sorted((ROOT / "csrc").glob("*.cuh")), *sorted((ROOT / "csrc").glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    cubin = CUBINS / f"{source.stem}-{architecture}-{digest.hexdigest()[:32]}.cubin"
    if not cubin.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(".part")
        command = [str(NVCC), *shlex.split(flags), "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.rename(cubin)
    return cubin


@pytest.fixture(scope="module")
def cubins(request: pytest.FixtureRequest) -> dict[str, Functions]:
    """Architecture -> function -> its resources and its instructions."""
    if request.config.getoption("--launches") != "all":
        pytest.skip("make test-aot compiles them")
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    wanted = [(path, "sm_80") for path in sources if not path.name.endswith(HOPPER_ALONE)]
    wanted += [(path, "sm_90a") for path in sources]
    found: dict[str, Functions] = {"sm_80": {}, "sm_90a": {}}
    with ThreadPoolExecutor(2) as pool:
        for (_, architecture), cubin in zip(wanted, pool.map(lambda job: compile_source(*job), wanted), strict=True):
            text = gpu_binaries.dump(cubin, "-res-usage", "-sass")
            used, code = gpu_binaries.cubin_resources(text), gpu_binaries.cubin_instructions(text)
            assert used.keys() == code.keys()
            found[architecture] |= {name: (used[name], code[name]) for name in used}
    return found


def instructions(functions: Functions, kernel: str, *starts: str) -> dict[str, list[str]]:
    """Function of a kernel -> which of its instructions start so."""
    found = {name: code for name, (_, code) in functions.items() if kernel in name}
    assert found, kernel
    return {name: [one for one in code if one.startswith(starts)] for name, code in found.items()}


def test_no_kernel_spills(cubins: dict[str, Functions]) -> None:
    """But what aot_known.json has, which may not grow."""
    found = {
        f"{architecture} {name}": used["STACK"] + used["LOCAL"]
        for architecture, functions in cubins.items()
        for name, (used, _) in functions.items()
    }
    recorded = KNOWN["nvcc"]["spill_bytes"]
    assert {name: size for name, size in found.items() if size > recorded.get(name, 0)} == {}


def test_decoding_runs_on_the_tensor_cores_and_copies_16_bytes_at_a_time(cubins: dict[str, Functions]) -> None:
    for functions in cubins.values():
        for name, found in instructions(functions, "mixed_linear_decode_mma", "HMMA.16816.F32", "LDGSTS").items():
            copies = [one for one in found if one.startswith("LDGSTS")]
            assert copies, name
            assert len(found) > len(copies), name
            assert all(".BYPASS" in one and ".128" in one for one in copies), name


def test_the_scalar_form_loads_16_bytes_at_a_time_where_rows_are_aligned(cubins: dict[str, Functions]) -> None:
    for functions in cubins.values():
        for name, loads in instructions(functions, "mixed_linear_decodeI", "LDG").items():
            is_aligned = "ELb1E" in name
            assert any(".128" in load for load in loads) == is_aligned, name


def test_hoppers_kernel_multiplies_by_warpgroups_and_copies_in_bulk(cubins: dict[str, Functions]) -> None:
    for name, found in instructions(cubins["sm_90a"], "mixed_linear_segments", "HGMMA").items():
        assert found, name
    for name, found in instructions(cubins["sm_90a"], "mixed_linear_segments", "UTMALDG", "UBLKCP").items():
        assert found, name
