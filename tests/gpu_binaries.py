"""What a GPU binary says of itself: registers, stack and local memory, shared memory, the instructions that matter."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Products on the tensor cores, loads and copies from global memory, local memory.
SASS = re.compile(r"\b((?:HMMA|HGMMA|UTC\w*MMA|LDGSTS|LDG|UBLKCP|UTMALDG|LDL|STL)\b[\w.]*)")
GCN = re.compile(r"^\s+(v_mfma_\w+|(?:global|buffer|flat)_load_\w+|scratch_\w+)\b", re.MULTILINE)


def cuobjdump() -> str:
    """The toolkit's program where there is a toolkit, else the one that comes with Triton."""
    import triton

    found = shutil.which("cuobjdump")
    return found or str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def dump(file: str | Path, *what: str, program: str | None = None) -> str:
    command = [program or cuobjdump(), *what, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cubin_resources(text: str) -> dict[str, dict[str, int]]:
    """Function -> what `cuobjdump -res-usage` says of it: REG, STACK, SHARED, LOCAL."""
    found = re.findall(r"Function (\S+):\s+(REG:[^\n]*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def cubin_instructions(text: str) -> dict[str, Counter[str]]:
    """Function -> the instructions of SASS in it, of those that `cuobjdump -sass` printed."""
    parts = re.split(r"Function : (\S+)", text)[1:]
    return {name: Counter(SASS.findall(code)) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def read_binary(asm: Any, is_disassembled: bool) -> dict[str, Any]:
    """What a kernel that Triton compiled says of itself; asm: Triton's stages of it, by name."""
    if "cubin" not in asm:
        return _gcn_facts(asm["amdgcn"])
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        what = ("-res-usage", "-sass") if is_disassembled else ("-res-usage",)
        text = dump(cubin.name, *what, program=triton.knobs.nvidia.cuobjdump.path)
    (used,) = cubin_resources(text).values()
    return {
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "warp_size": 32,
        "instructions": next(iter(cubin_instructions(text).values()), {}),
        "asserts": "__assertfail" in asm["ptx"],
    }


def _gcn_facts(text: str) -> dict[str, Any]:
    """The same by the metadata that goes into AMD's binary."""
    fields = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+): +(\d+)$", text, re.MULTILINE)}
    calls = "uses_dynamic_stack: true" in text  # of the assertion's printing: a stack, and no spill
    return {
        "registers": fields["vgpr_count"],
        "spill_bytes": 4 * fields["vgpr_spill_count"] if calls else fields["private_segment_fixed_size"],
        "warp_size": fields["wavefront_size"],
        "instructions": Counter(GCN.findall(text)),
        "asserts": "s_trap" in text,
    }
