"""The Triton kernels compile ahead of time for sm_80 and sm_90 as they are launched, without a spill.

Run as a program, this file calls the launchers on meta tensors with a recorder in the kernels' place, compiles every
distinct launch and prints one JSON record per cubin. The tests run it in a child process, because Triton's interpreter
(which other test modules use) and its compiler do not mix in one process. Results stay in Triton's own cache.

An operator has an entry in KERNELS and a function `record_<operator>`, which calls its launchers as they are called.
"""

import functools
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
# Operator -> its kernels; True: one that multiplies matrices, which 16-bit rows do on the tensor cores.
KERNELS = {
    "mixed_linear": {
        "mixed_product_kernel": True,
        "deltas_gradient_kernel": True,
        "row_coefficients_gradient_kernel": True,
        "weighting_sum_kernel": False,
        "segment_product_kernel": True,
        "segment_gradient_kernel": True,
        "run_ends_kernel": False,
        "mix_panel_kernel": False,
        "scale_into_copies_kernel": False,
    },
    "mixed_linear_logprob": {
        "softmax_partials_kernel": True,
        "softmax_kernel": False,
        "output_gradient_kernel": True,
        "mixed_product_kernel": True,
        "deltas_gradient_kernel": True,
        "row_coefficients_gradient_kernel": True,
        "weighting_sum_kernel": False,
        "scale_into_copies_kernel": False,
    },
    "low_rank_linear": {
        "shrink_kernel": True,
        "expand_kernel": True,
        "factor_gradient_kernel": True,
        "weighting_sum_kernel": False,
    },
    "mixed_embedding": {
        "mixed_embedding_kernel": False,
        "position_sum_kernel": False,
        "coefficient_terms_kernel": False,
        "weighting_sum_kernel": False,
    },
    "mixed_norm": {
        "mixed_norm_kernel": False,
        "input_gradient_kernel": False,
        "parameter_gradients_kernel": False,
        "coefficient_terms_kernel": False,
        "weighting_sum_kernel": False,
    },
}


class Recorder:
    """Stands in for every kernel: keeps the signature of each launch instead of launching it.

    The label of a launch says in which configuration it was recorded; "bf16" in it, that the rows are bfloat16.
    """

    def __init__(self, operator: str) -> None:
        self.operator, self.label = operator, ""
        self.launches: list[dict[str, Any]] = []

    def record(self, kernel: Any, *args: Any, **named: Any) -> None:
        """Specialises as Triton's launcher does: None and 1 become constants, multiples of 16 are declared as such."""
        from triton.runtime.jit import mangle_type

        constants = {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {"debug": bool(kernel.debug), **{name: named[name] for name in named if name not in constants}}
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        signature, constexprs, attrs = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            value = values[name]
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if name in constants or value is None or (is_int and value == 1):
                signature[name], constexprs[(index,)] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if not isinstance(value, float) and (not is_int or value % 16 == 0):
                attrs[(index,)] = [["tt.divisibility", 16]]
        where = {"operator": self.operator, "kernel": kernel, "label": self.label}
        launch = {"signature": signature, "constexprs": constexprs, "attrs": attrs, "options": options}
        self.launches.append({**where, **launch})


def record_launches() -> list[dict[str, Any]]:
    """Calls the launchers of every operator with a recorder in place of Triton's own launch."""
    from triton import JITFunction

    launches: list[dict[str, Any]] = []
    for operator in KERNELS:
        recorder = Recorder(operator)
        JITFunction.__getitem__ = lambda kernel, grid, r=recorder: functools.partial(r.record, kernel)
        globals()[f"record_{operator}"](recorder)
        launches += recorder.launches
    return launches


def record_mixed_linear(recorder: Recorder) -> None:
    """SmolLM2-135M's attention size, odd sizes and training size included."""
    import torch

    import clp_kernels.mixed_linear_segments_triton as segments
    import clp_kernels.mixed_linear_triton as launchers

    def call(
        label: str, M: int, N: int, D: int, x: torch.dtype, deltas: torch.dtype, *, backward: bool, S: int = 0
    ) -> None:
        recorder.label = label
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        base_ND, deltas_NKD = x_MD.new_empty(N, D), x_MD.new_empty(N, 2, D, dtype=deltas)
        c_SK = x_MD.new_empty(S or M, 2, dtype=torch.float32)
        row_map_M = x_MD.new_empty(M, dtype=torch.int32)
        exact_delta = "rounded" not in label
        y_MN = launchers.forward(x_MD, base_ND, deltas_NKD, c_SK, row_map_M, None, None, exact_delta=exact_delta)
        if backward:
            launchers.backward_x(y_MN, base_ND, deltas_NKD, c_SK, row_map_M, exact_delta=exact_delta)
            launchers.backward_deltas(y_MN, x_MD, deltas_NKD, c_SK, row_map_M, True, True)

    f32, bf16 = torch.float32, torch.bfloat16
    call("decode bf16", 16, 576, 576, bf16, bf16, backward=False)
    call("decode bf16, deltas f32", 16, 576, 576, bf16, f32, backward=False)
    call("decode f32, odd", 3, 35, 33, f32, f32, backward=False)
    call("small batch bf16, deltas f32", 64, 576, 576, bf16, f32, backward=False)
    call("training bf16", 1024, 576, 576, bf16, bf16, backward=False)
    call("training bf16, deltas f32", 1024, 576, 576, bf16, f32, backward=True)
    call("training f32", 1024, 576, 576, f32, f32, backward=True)
    call("segments bf16, deltas f32", 2048, 576, 576, bf16, f32, backward=True, S=8)
    call("segments bf16, rounded", 2048, 576, 576, bf16, bf16, backward=True, S=8)
    call("one weighting bf16, rounded", 2048, 576, 576, bf16, bf16, backward=True, S=1)
    call("one weighting f32", 2048, 576, 576, f32, f32, backward=True, S=1)
    segments.device_limits = lambda device: (9, SHARED_BYTES[90])
    call("segments bf16, deltas f32, sm_90", 2048, 576, 576, bf16, f32, backward=True, S=8)
    call("segments bf16, sm_90", 2048, 576, 576, bf16, bf16, backward=True, S=8)
    call("segments bf16, rounded, sm_90", 2048, 576, 576, bf16, bf16, backward=True, S=8)


def record_mixed_linear_logprob(recorder: Recorder) -> None:
    """The head at SmolLM2-135M's size, an odd one, what it shares with mixed_linear included."""
    import torch

    import clp_kernels.mixed_linear_logprob_triton as launchers
    from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets

    def call(label: str, M: int, V: int, D: int, x: torch.dtype, deltas: torch.dtype, softcap: float | None) -> None:
        recorder.label = label
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        row_map_M, rows_M = x_MD.new_empty(M, dtype=torch.int32), x_MD.new_empty(M, dtype=torch.float32)
        c_SK, ids_M = x_MD.new_empty(4, 2, dtype=torch.float32), x_MD.new_empty(M, dtype=torch.int64)
        head = Head(x_MD.new_empty(V, D), x_MD.new_empty(V, 2, D, dtype=deltas), c_SK, row_map_M, None, None)
        arguments = (x_MD, head, Targets(ids_M, -100), Logits(0.7, 1.3, softcap))
        _, entropy_M, normalizer_M2, _ = launchers.forward(*arguments, True, False)
        needs = Needs(True, True, True, True, False, False)
        launchers.backward(*arguments, normalizer_M2, entropy_M, rows_M, rows_M, needs)

    f32, bf16 = torch.float32, torch.bfloat16
    call("few rows bf16, deltas f32", 16, 49152, 576, bf16, f32, None)
    call("training bf16", 1024, 49152, 576, bf16, bf16, None)
    call("training bf16, deltas f32, capped", 1024, 49152, 576, bf16, f32, 30.0)
    call("training f32, capped", 1024, 49152, 576, f32, f32, 30.0)
    call("f32, odd", 3, 35, 33, f32, f32, None)


def record_low_rank_linear(recorder: Recorder) -> None:
    """A layer of 4096 features with 64 ranks, of 576 with 16, odd sizes; beside a quantised base: none of its own."""
    import torch

    import clp_kernels.low_rank_linear_triton as launchers

    def call(label: str, M: int, D: int, R: int, x: torch.dtype, factors: torch.dtype, *, backward: bool) -> None:
        recorder.label = label
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        base_ND = None if "no base" in label else x_MD.new_empty(D, D)
        down_RD, up_NR = x_MD.new_empty(R, D, dtype=factors), x_MD.new_empty(D, R, dtype=factors)
        gates_SR, row_map_M = down_RD.new_empty(4, R, dtype=torch.float32), x_MD.new_empty(M, dtype=torch.int32)
        rest = (base_ND, down_RD, up_NR, gates_SR, row_map_M)
        y_MN, shrink_MR = launchers.forward(x_MD, *rest, None, backward)
        if backward:
            launchers.backward(y_MN, shrink_MR, x_MD, *rest, (True, False, True, True, True))

    f32, bf16 = torch.float32, torch.bfloat16
    call("decode bf16", 16, 4096, 64, bf16, bf16, backward=False)
    call("decode bf16, factors f32", 16, 4096, 64, bf16, f32, backward=False)
    call("decode f32, odd", 3, 33, 5, f32, f32, backward=False)
    call("small batch bf16, factors f32", 64, 576, 16, bf16, f32, backward=False)
    call("training bf16, no base", 4096, 4096, 64, bf16, bf16, backward=True)
    call("training bf16, factors f32", 4096, 4096, 64, bf16, f32, backward=True)
    call("training f32", 1024, 576, 16, f32, f32, backward=True)


def record_mixed_embedding(recorder: Recorder) -> None:
    """Wide and narrow embeddings, trained with and without `main_grad`, and one without a base at an odd width."""
    import torch

    import clp_kernels.mixed_embedding_triton as launchers

    def call(label: str, M: int, D: int, dtype: torch.dtype, deltas: torch.dtype, *, main_grad: bool) -> None:
        recorder.label = label
        ids_M = torch.empty(M, dtype=torch.int64, device="meta")
        base_VD = None if "no base" in label else ids_M.new_empty(512, D, dtype=dtype)
        deltas_VKD = ids_M.new_empty(512, 2, D, dtype=deltas)
        c_SK, row_map_M = deltas_VKD.new_empty(4, 2, dtype=torch.float32), ids_M.new_empty(M, dtype=torch.int32)
        dy_MD = launchers.forward(ids_M, base_VD, deltas_VKD, c_SK, row_map_M)
        buffer = deltas_VKD.new_empty(deltas_VKD.shape, dtype=torch.float32) if main_grad else None
        launchers.backward(dy_MD, ids_M, deltas_VKD, c_SK, row_map_M, 2, not main_grad, True, True, buffer)

    f32, bf16 = torch.float32, torch.bfloat16
    call("bf16, deltas f32", 2048, 4096, bf16, f32, main_grad=True)
    call("bf16", 2048, 576, bf16, bf16, main_grad=False)
    call("f32, odd, no base", 17, 33, f32, f32, main_grad=False)


def record_mixed_norm(recorder: Recorder) -> None:
    """Llama's norm of 4096 features, of Gemma's and of a head's 128 features, LayerNorm with a bias, an odd width."""
    import torch

    import clp_kernels.mixed_norm_triton as launchers

    def call(
        label: str, M: int, D: int, x: torch.dtype, deltas: torch.dtype, *, layer: bool = False, casts: bool = False
    ) -> None:
        recorder.label = label
        x_MD = torch.empty(M, D, dtype=x, device="meta")
        weight_D, deltas_DK = x_MD.new_empty(D), x_MD.new_empty(D, 4, dtype=deltas)
        c_SK, row_map_M = x_MD.new_empty(4, 4, dtype=torch.float32), x_MD.new_empty(M, dtype=torch.int32)
        parameters = (weight_D, deltas_DK, c_SK, row_map_M)
        bias_D, bias_deltas_DK = (weight_D, deltas_DK) if layer else (None, None)
        settings = (1e-5, layer, 0.0, casts)
        dy_MD = launchers.forward(x_MD, *parameters, bias_D, bias_deltas_DK, *settings)
        launchers.backward(dy_MD, x_MD, *parameters, bias_deltas_DK, *settings, True, True, True, layer, layer, True)

    f32, bf16 = torch.float32, torch.bfloat16
    call("llama bf16, deltas f32", 4096, 4096, bf16, f32, casts=True)
    call("narrow bf16", 65536, 128, bf16, bf16)
    call("layer bf16, deltas f32", 4096, 2048, bf16, f32, layer=True)
    call("layer f32, odd", 17, 33, f32, f32, layer=True)


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
        "operator": launch["operator"],
        "kernel": launch["kernel"].__name__,
        "label": launch["label"],
        "architecture": architecture,
        "registers": int(used["REG"]),
        "stack_bytes": int(used["STACK"]),
        "local_bytes": int(used["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "asserts": "__assertfail" in compiled.asm["ptx"],
        "tensor_cores": "mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"],
        "warpgroups": "wgmma.mma_async" in compiled.asm["ptx"],
    }


@pytest.fixture(scope="module")
def cubins() -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_both_architectures(cubins: list[dict[str, Any]]) -> None:
    assert {(cubin["operator"], cubin["kernel"], cubin["architecture"]) for cubin in cubins} == {
        (operator, kernel, architecture)
        for operator, kernels in KERNELS.items()
        for kernel in kernels
        for architecture in ARCHITECTURES
    }


def test_no_kernel_spills_or_outgrows_the_chip(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        assert cubin["stack_bytes"] == 0, cubin
        assert cubin["local_bytes"] == 0, cubin
        assert cubin["registers"] <= MAX_REGISTERS, cubin
        assert cubin["shared_bytes"] <= SHARED_BYTES[cubin["architecture"]], cubin


def test_16_bit_rows_run_on_the_tensor_cores(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        if "bf16" in cubin["label"] and KERNELS[cubin["operator"]][cubin["kernel"]]:
            assert cubin["tensor_cores"], cubin


def test_segments_run_on_hoppers_warpgroup_products(cubins: list[dict[str, Any]]) -> None:
    found = [c for c in cubins if c["kernel"].startswith("segment_") and c["architecture"] == 90]
    assert found
    for cubin in found:
        assert cubin["warpgroups"], cubin


def test_float32_is_not_rounded_to_tf32(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        if "bf16" not in cubin["label"]:
            assert not cubin["tensor_cores"], cubin


def test_ids_out_of_range_stop_the_embedding(cubins: list[dict[str, Any]]) -> None:
    for cubin in cubins:
        assert cubin["asserts"] == (cubin["kernel"] == "mixed_embedding_kernel"), cubin


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
    recorded = record_launches()
    # A label may name the one architecture that takes its tiles.
    wanted = [(launch, a) for launch in recorded for a in ARCHITECTURES if a == 90 or "sm_90" not in launch["label"]]
    print(json.dumps([compile_launch(launch, architecture) for launch, architecture in wanted]))
