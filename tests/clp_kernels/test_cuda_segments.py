"""The Hopper kernel of mixed_linear: as it was built, and on a GPU against float64.

Without a Hopper GPU only what was built is looked at, and which calls would reach it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

import clp_kernels
from clp_kernels import mixed_linear, mixed_linear_cuda, mixed_linear_ref

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
BUILT = Path(clp_kernels.__file__).with_name("_cuda.abi3.so")
needs_build = pytest.mark.skipif(not BUILT.exists(), reason="the CUDA part was not built")
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == mixed_linear_cuda.HOPPER
MISSING = clp_kernels.available_backends()["cuda"]
on_a_gpu = pytest.mark.skipif(not HAS_HOPPER or MISSING is not None, reason=f"needs a Hopper GPU; back-end: {MISSING}")
# Deltas, M, D, N, K, S, what is particular: rows of a weighting in whole tiles, over borders of tiles, and mixed up.
CASES = [
    (BF16, 512, 128, 256, 2, 1, {}),
    (BF16, 1000, 72, 264, 2, 3, {"bias": True}),
    (F32, 1000, 200, 136, 2, 3, {"bias": True}),
    (F32, 700, 72, 8, 4, 2, {}),
    (BF16, 777, 200, 392, 3, 3, {"interleaved": True}),
    (BF16, 1100, 64, 64, 1, 4, {"base": False}),
    (F32, 600, 264, 72, 2, 2, {"base": False, "interleaved": True}),
]
IDS = [f"deltas-{d}-M{M}-D{D}-N{N}-K{K}-S{S}-{'-'.join(how)}".replace("torch.", "") for d, M, D, N, K, S, how in CASES]


@needs_build
def test_the_built_kernel_keeps_everything_in_registers():
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    dump = subprocess.run([cuobjdump, "-res-usage", BUILT], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S*mixed_linear_segments\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+) ", dump)
    assert len(found) == 2 * 4 * 2 * 2 * 2  # deltas' dtypes, copies, base, exact, direction
    for name, registers, stack, local in found:
        # What the rest of the block leaves a thread of the 384 at its start: the multiplying ones take more from it.
        is_widest = "fLi4ELb0ELb1" in name  # four float32 copies without a base, in two operands each: 8 bytes
        assert int(registers) <= 168, name
        assert int(local) == 0, name
        assert int(stack) <= (8 if is_widest else 0), name


@pytest.mark.parametrize(
    ("changed", "reaches"),
    [
        ({}, True),
        ({"deltas": F32}, True),
        ({"base": None}, True),
        ({"S": 3}, False),  # fewer than 256 rows a weighting
        ({"S": 3, "M": 768}, True),
        ({"rows": torch.float16, "base": torch.float16}, False),
        ({"base": F32}, False),
        ({"deltas": torch.float16}, False),
        ({"K": 5}, False),
        ({"D": 36}, False),  # rows of 72 bytes: the copy engine wants multiples of 16
        ({"batch_invariant": True}, False),
        ({"rounds": True, "S": 1}, False),  # panels
        ({"rounds": True, "S": 2}, True),
    ],
    ids=str,
)
def test_which_calls_reach_it(monkeypatch, changed, reaches):
    monkeypatch.setattr(mixed_linear_cuda, "_is_hopper", lambda device: True)
    c = {"M": 512, "D": 64, "K": 2, "S": 2, "rows": BF16, "base": BF16, "deltas": BF16} | changed
    base = None if c["base"] is None else torch.empty(40, c["D"], dtype=c["base"])
    rows, deltas = torch.empty(c["M"], c["D"], dtype=c["rows"]), torch.empty(40, c["K"], c["D"], dtype=c["deltas"])
    how = (c.get("batch_invariant", False), not c.get("rounds", False))
    assert mixed_linear_cuda._runs_segments(rows, base, deltas, torch.empty(c["S"], c["K"]), *how) == reaches


def problem(deltas, M, D, N, K, S, *, base=True, bias=False, interleaved=False, size=1.0):
    generator = torch.Generator("cuda").manual_seed(M + D)

    def normal(*shape, std=1.0):
        return torch.empty(shape, device="cuda").normal_(0, std, generator=generator)

    rows = torch.arange(M, device="cuda")
    found = {
        "x": normal(M, D).to(BF16),
        "base": normal(N, D, std=D**-0.5).to(BF16) if base else None,
        "deltas": normal(N, K, D, std=size * D**-0.5).to(deltas),
        "coefficients": torch.rand(S, K, device="cuda", generator=generator),
        "row_map": (rows % S if interleaved else rows * S // M).int(),
    }
    return found | ({"bias": normal(N).to(BF16), "bias_deltas": normal(N, K).to(deltas)} if bias else {})


def run(op, arguments, dtype=None, **settings):
    """y and the gradients of x and the deltas, for a dy that every dtype holds."""
    floating = {name: t for name, t in arguments.items() if t is not None and t.is_floating_point()}
    inputs = arguments | {name: t.to(dtype or t.dtype).clone() for name, t in floating.items()}
    for name in ("x", "deltas"):
        inputs[name].requires_grad_()
    y = op(**inputs, **settings)
    dy = torch.empty(y.shape, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(5)).to(BF16)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": inputs["x"].grad, "deltas": inputs["deltas"].grad}


@on_a_gpu
@pytest.mark.parametrize("exact_delta", [True, False])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_and_gradients_on_a_gpu(case, exact_delta):
    *sizes, how = case
    a = problem(*sizes, **how)
    ours = run(mixed_linear, a, backend="cuda", exact_delta=exact_delta)
    again = run(mixed_linear, a, backend="cuda", exact_delta=exact_delta)
    exact = run(mixed_linear_ref, a, F64)
    for name, expected in exact.items():
        error = (ours[name].double() - expected).norm() / expected.norm()
        # Of bfloat16: an operand and the result are rounded; a premixed base too, and float32 gradients not at all.
        assert error < (1e-6 if ours[name].dtype == F32 else 2.5e-3 if exact_delta else 3.5e-3), name
        assert torch.equal(ours[name], again[name]), name


@on_a_gpu
@pytest.mark.parametrize("base", [True, False])
def test_small_deltas_keep_their_effect_on_a_gpu(base):
    a = problem(F32, 2048, 1024, 512, 2, 4, size=1e-3)
    on, off = a["coefficients"], torch.zeros_like(a["coefficients"])
    if not base:  # copies that differ by little, at weights that keep their sum
        copies = a["deltas"] * torch.tensor([1.0, -1.0], device="cuda")[:, None] + a["base"].float()[:, None] / 2
        a |= {"base": None, "deltas": copies}
        on, off = torch.stack([1 + on[:, 0], 1 - on[:, 0]], 1), torch.ones_like(on)

    def effect(op, dtype=None, **settings):
        y, y_off = (run(op, a | {"coefficients": c}, dtype, **settings)["y"].double() for c in (on, off))
        return y - y_off

    exact = effect(mixed_linear_ref, F64)
    kept, rounded = (
        ((effect(mixed_linear, backend="cuda", exact_delta=e) * exact).sum() / exact.square().sum()).item()
        for e in (True, False)
    )
    assert kept == pytest.approx(1, abs=0.02)
    assert not 0.98 < rounded < 1.02


@on_a_gpu
def test_a_row_has_its_bits_beside_any_weighting_on_a_gpu():
    a = problem(BF16, 1024, 136, 72, 2, 4)
    others = a | {"x": a["x"].clone(), "row_map": a["row_map"].clone()}
    others["x"][1::2], others["row_map"][1::2] = 7.0, (a["row_map"][1::2] + 1) % 4
    y, y_others = (mixed_linear(**inputs, backend="cuda") for inputs in (a, others))
    assert torch.equal(y[::2], y_others[::2])
    assert not torch.equal(y[1::2], y_others[1::2])


@on_a_gpu
def test_a_graph_follows_its_buffers_on_a_gpu():
    """Row map and coefficients are static buffers of a captured graph, rewritten between replays."""
    a = problem(BF16, 1024, 128, 128, 2, 4)
    expected = [mixed_linear(**a, backend="cuda")]
    changed = a | {"coefficients": a["coefficients"].flip(0), "row_map": a["row_map"].flip(0).contiguous()}
    expected.append(mixed_linear(**changed, backend="cuda"))
    buffers = a | {name: a[name].clone() for name in ("coefficients", "row_map")}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mixed_linear(**buffers, backend="cuda")
    for inputs, y_expected in zip((a, changed), expected, strict=True):
        for name in ("coefficients", "row_map"):
            buffers[name].copy_(inputs[name])
        graph.replay()
        assert torch.equal(y, y_expected)
