"""The Triton kernels compile ahead of time for sm_80 and sm_90 as they are launched, without a spill.

Run as a program, this file calls the launchers on meta tensors with a recorder in the kernels' place, compiles every
distinct launch and prints one JSON record per cubin. The tests run it in a child process, because Triton's interpreter
(which other test modules use) and its compiler do not mix in one process. Results stay in Triton's own cache.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = (80, 90)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one block may use
MAX_REGISTERS = 255
KERNELS = {
    "mixed_product_kernel",
    "deltas_gradient_kernel",
    "row_coefficients_gradient_kernel",
    "weighting_sum_kernel",
}
LOGPROB_KERNELS = {"softmax_partials_kernel", "softmax_kernel", "output_gradient_kernel"}
SUMS = {"weighting_sum_kernel", "softmax_kernel"}  # nothing is multiplied there


class Recorder:
    """Stands in for a kernel: keeps the signature of each launch instead of launching it."""

    def __init__(self, kernel: Any, label: str, launches: list[dict[str, Any]]) -> None:
        self.kernel, self.label, self.launches = kernel, label, launches

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        """Specialises as Triton's launcher does: None and 1 become constants, multiples of 16 are declared as such."""
        from triton.runtime.jit import mangle_type

        values = {**dict(zip(self.kernel.arg_names, args, strict=False)), **constants}
        signature, constexprs, attrs = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = values[name]
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if name in constants or value is None or (is_int and value == 1):
                signature[name], constexprs[(index,)] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if not is_int or value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        options = {"num_warps": num_warps, "num_stages": num_stages}
        launch = {"signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}
        self.launches.append({"kernel": self.kernel, "label": self.label, **launch})


def record_launches() -> list[dict[str, Any]]:
    """Calls the launchers on meta tensors at SmolLM2-135M's attention size, odd sizes and training size included."""
    import torch

    import clp_kernels.mixed_linear_triton as launchers

    launches: list[dict[str, Any]] = []
    kernels = {name: getattr(launchers, name) for name in KERNELS}

    def call(label: str, M: int, N: int, D: int, x: torch.dtype, deltas: torch.dtype, *, backward: bool) -> None:
        for name, kernel in kernels.items():
            setattr(launchers, name, Recorder(kernel, label, launches))
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        base_ND, deltas_NKD = x_MD.new_empty(N, D), x_MD.new_empty(N, 2, D, dtype=deltas)
        c_SK = x_MD.new_empty(4, 2, dtype=torch.float32)
        row_map_M = x_MD.new_empty(M, dtype=torch.int32)
        y_MN = launchers.forward(x_MD, base_ND, deltas_NKD, c_SK, row_map_M, None, None)
        if backward:
            launchers.backward_x(y_MN, base_ND, deltas_NKD, c_SK, row_map_M)
            launchers.backward_deltas(y_MN, x_MD, deltas_NKD, c_SK, row_map_M, True, True)

    f32, bf16 = torch.float32, torch.bfloat16
    call("decode bf16", 16, 576, 576, bf16, bf16, backward=False)
    call("decode bf16, deltas f32", 16, 576, 576, bf16, f32, backward=False)
    call("decode f32, odd", 3, 35, 33, f32, f32, backward=False)
    call("small batch bf16, deltas f32", 64, 576, 576, bf16, f32, backward=False)
    call("training bf16", 1024, 576, 576, bf16, bf16, backward=False)
    call("training bf16, deltas f32", 1024, 576, 576, bf16, f32, backward=True)
    call("training f32", 1024, 576, 576, f32, f32, backward=True)
    return launches


def record_mixed_linear_logprob() -> list[dict[str, Any]]:
    """Calls the launchers of the head on one chunk of SmolLM2-135M's, what they share with mixed_linear included."""
    import torch

    import clp_kernels.mixed_linear_logprob_triton as launchers
    import clp_kernels.mixed_linear_triton as shared
    from clp_kernels import mixed_linear_triton_kernels
    from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets

    launches: list[dict[str, Any]] = []
    kernels = {
        **{(launchers, name): getattr(launchers, name) for name in LOGPROB_KERNELS},
        **{(shared, name): getattr(mixed_linear_triton_kernels, name) for name in KERNELS},
    }

    def call(label: str, M: int, V: int, D: int, x: torch.dtype, deltas: torch.dtype, softcap: float | None) -> None:
        for (module, name), kernel in kernels.items():
            setattr(module, name, Recorder(kernel, label, launches))
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        row_map_M, rows_M = x_MD.new_empty(M, dtype=torch.int32), x_MD.new_empty(M, dtype=torch.float32)
        c_SK, ids_M = x_MD.new_empty(4, 2, dtype=torch.float32), x_MD.new_empty(M, dtype=torch.int64)
        deltas_VKD = x_MD.new_empty(V, 2, D, dtype=deltas)
        head = Head(x_MD.new_empty(V, D), deltas_VKD, c_SK, row_map_M, None, None)
        arguments = (x_MD, head, Targets(ids_M, -100), Logits(0.7, 1.3, softcap))
        _, entropy_M, normalizer_M2, _ = launchers.forward(*arguments, True, False)
        needs = Needs(True, True, True, True, False, False)
        main_grad = deltas_VKD if deltas != x else None
        launchers.backward(*arguments, normalizer_M2, entropy_M, rows_M, rows_M, needs, main_grad)

    f32, bf16 = torch.float32, torch.bfloat16
    call("head, few rows bf16, deltas f32", 16, 8192, 576, bf16, f32, None)
    call("head, training bf16", 1024, 8192, 576, bf16, bf16, None)
    call("head, training bf16, deltas f32, capped", 1024, 8192, 576, bf16, f32, 30.0)
    call("head, training f32, capped", 1024, 8192, 576, f32, f32, 30.0)
    call("head, f32, odd", 3, 35, 33, f32, f32, None)
    return launches


def compile_launch(launch: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compiles one recorded launch for one architecture and reads the cubin's resources with Triton's cuobjdump."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch["kernel"], launch["signature"], launch["constexprs"], launch["attrs"])
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        dump = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump))
    return {
        "kernel": launch["kernel"].__name__,
        "label": launch["label"],
        "architecture": architecture,
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]),
        "local_bytes": int(used["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"],
    }


@pytest.fixture(scope="module")
def cubins() -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_both_architectures(cubins: list[dict[str, Any]]) -> None:
    assert {(cubin["kernel"], cubin["architecture"]) for cubin in cubins} == {
        (kernel, architecture) for kernel in KERNELS | LOGPROB_KERNELS for architecture in ARCHITECTURES
    }


def test_no_kernel_spills_or_outgrows_the_chip(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        assert cubin["stack_bytes"] == 0, cubin
        assert cubin["local_bytes"] == 0, cubin
        assert cubin["registers"] <= MAX_REGISTERS, cubin
        assert cubin["shared_bytes"] <= SHARED_BYTES[cubin["architecture"]], cubin


def test_16_bit_rows_run_on_the_tensor_cores(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        if "bf16" in cubin["label"] and cubin["kernel"] not in SUMS:
            assert cubin["tensor_cores"], cubin


def test_float32_is_not_rounded_to_tf32(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        if "bf16" not in cubin["label"]:
            assert not cubin["tensor_cores"], cubin


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
    recorded = record_launches() + record_mixed_linear_logprob()
    print(json.dumps([compile_launch(launch, architecture) for launch in recorded for architecture in ARCHITECTURES]))
