"""The Triton kernels compile for GPUs that are not here, and their binaries are what they should be.

`make test` compiles each kernel once for each target, in its hot configuration. `make test-aot` (--launches=all)
compiles everything that the launchers can launch, and the hot configurations with the release of Triton in
--other-triton too. A child process does it (aot_compile); binaries stay in Triton's cache.

What spills, or asks for more shared memory than there is, is in aot_known.json, by release of Triton; none of it may
grow. Of hot configurations it names those that spill.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot_launches import PROPERTIES
from aot_recorder import TARGETS, shipped_kernels

PROGRAM = Path(__file__).parents[1] / "aot_compile.py"
KNOWN = json.loads(Path(__file__).with_name("aot_known.json").read_text())
HALVES = ("bfloat16", "float16")
MAX_REGISTERS = {"cuda": 255, "hip": 512}  # AMD's include those that accumulate
TENSOR_MEMORY = 512  # columns: what Triton lets a program have on sm_100
Binary = dict[str, Any]


def compile_launches(which: str, path: str = "") -> tuple[str, list[Binary]]:
    """Triton's release and its binaries; path goes before everything else that the child imports from."""
    path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, PROGRAM, which], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["triton"], found["binaries"]


@pytest.fixture(scope="module", params=["the installed Triton", "the other Triton"])
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[Binary]]:
    if request.param == "the installed Triton":
        return compile_launches(request.config.getoption("--launches"))
    folder = request.config.getoption("--other-triton")
    if folder is None:
        pytest.skip("no other Triton: make test-aot installs one beside")
    return compile_launches("hot", os.path.abspath(folder))


@pytest.fixture(scope="module")
def binaries(compiled: tuple[str, list[Binary]]) -> list[Binary]:
    return compiled[1]


@pytest.fixture(scope="module")
def known(compiled: tuple[str, list[Binary]]) -> dict[str, Any]:
    """What is known of this release of Triton: fact -> launch -> bytes; hot_that_spill: launches."""
    return KNOWN.get(compiled[0], {})


def launch_id(binary: Binary) -> str:
    return f"{binary['target']} {binary['kernel']} ({binary['label']})"


def having(binaries: list[Binary], kernel_property: str) -> list[Binary]:
    found = [binary for binary in binaries if kernel_property in PROPERTIES[binary["kernel"]]]
    assert found
    return found


def instructions(binary: Binary, *starts: str) -> list[str]:
    return [name for name in binary["instructions"] if name.startswith(starts)]


def test_every_kernel_compiles_for_every_target(binaries: list[Binary]) -> None:
    expected = {(kernel, target) for kernel in shipped_kernels() for target in TARGETS}
    assert {(binary["kernel"], binary["target"]) for binary in binaries} == expected
    assert {(binary["kernel"], binary["target"]) for binary in binaries if binary["is_hot"]} == expected
    assert {binary["kernel"] for binary in binaries} == PROPERTIES.keys()


def test_hot_configurations_keep_everything_in_registers(binaries: list[Binary], known: dict[str, Any]) -> None:
    """But what aot_known.json says of them."""
    hot = [binary for binary in binaries if binary["is_hot"]]
    assert all(binary["copies"] <= 4 and binary["rows"] in HALVES for binary in hot)
    spilling = [launch_id(b) for b in hot if b["spill_bytes"] or instructions(b, "LDL", "STL", "scratch_")]
    assert sorted(spilling) == known.get("hot_that_spill", [])


@pytest.mark.parametrize("fact", ["spill_bytes", "shared_bytes_beyond_the_device"])
def test_what_is_known_does_not_grow(binaries: list[Binary], known: dict[str, Any], fact: str) -> None:
    recorded = known.get(fact, {})
    found: dict[str, int] = {}
    for binary in binaries:  # a call may launch a kernel more than once
        found[launch_id(binary)] = max(measured(binary, fact), found.get(launch_id(binary), 0))
    grown = {name: size for name, size in found.items() if size > recorded.get(name, 0)}
    assert grown == {}, f"more than aot_known.json has: {json.dumps(grown, indent=1)}"
    if not all(binary["is_hot"] for binary in binaries):
        gone = {name: size for name, size in recorded.items() if found.get(name, 0) < size}
        assert gone == {}, f"aot_known.json has more than there is: {gone}"


def measured(binary: Binary, fact: str) -> int:
    if fact == "spill_bytes":
        return binary["spill_bytes"]
    return max(0, binary["shared_bytes"] - TARGETS[binary["target"]].shared_bytes)


def test_binaries_fit_the_chip(binaries: list[Binary]) -> None:
    for binary in binaries:
        backend = TARGETS[binary["target"]].backend
        assert binary["registers"] <= MAX_REGISTERS[backend], launch_id(binary)
        assert binary["tensor_memory"] <= TENSOR_MEMORY, launch_id(binary)
        assert binary["warp_size"] == (32 if backend == "cuda" else 64), launch_id(binary)


def test_16_bit_rows_run_on_the_tensor_cores(binaries: list[Binary]) -> None:
    for binary in having(binaries, "dot"):
        if binary["rows"] in HALVES:
            assert instructions(binary, "HMMA", "HGMMA", "UTCHMMA", "v_mfma"), launch_id(binary)
            # AMD's matrix cores take float32 too, at an eighth of the rate.
            assert not [name for name in instructions(binary, "v_mfma") if name.endswith("_f32")], launch_id(binary)


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(binaries: list[Binary]) -> None:
    for binary in binaries:
        if binary["rows"] == "float32" and "dot" in PROPERTIES[binary["kernel"]]:
            used = instructions(binary, "HMMA", "HGMMA", "UTCHMMA", "v_mfma")
            used = [name for name in used if not name.endswith("_f32")]
            assert bool(used) == binary["allows_tf32"], launch_id(binary)


def test_segments_run_on_hoppers_warpgroup_products(binaries: list[Binary]) -> None:
    for binary in having(binaries, "warpgroup"):
        if binary["target"] == "cuda:90":
            assert instructions(binary, "HGMMA"), launch_id(binary)
        if binary["target"] == "cuda:100":
            assert instructions(binary, "UTCHMMA"), launch_id(binary)


def test_decoding_loads_16_bytes_at_a_time(binaries: list[Binary]) -> None:
    for binary in binaries:
        properties = PROPERTIES[binary["kernel"]]
        is_wide = "wide" in properties or ("wide on CUDA" in properties and binary["target"].startswith("cuda"))
        is_asked = "dot" not in properties or "decode" in binary["label"]
        # AMD's warps are of 64 threads: few rows leave one of them 8 bytes, beside 16 of the weights in the hot one.
        is_asked &= binary["target"].startswith("cuda") or binary["is_hot"]
        if not (is_wide and is_asked) or binary["rows"] not in HALVES or "odd" in binary["label"]:
            continue
        copies = instructions(binary, "LDGSTS")
        loads = instructions(binary, "LDG.", "global_load", "buffer_load")
        assert copies or [name for name in loads if name.endswith((".128", "x4"))], launch_id(binary)
        assert all(".BYPASS" in name and ".128" in name for name in copies), launch_id(binary)


def test_ids_out_of_range_stop_the_embedding(binaries: list[Binary]) -> None:
    for binary in binaries:
        assert binary["asserts"] == ("asserts" in PROPERTIES[binary["kernel"]]), launch_id(binary)
