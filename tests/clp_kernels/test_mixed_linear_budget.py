"""The rounding errors of mixed_linear's compiled kernels on random shapes, and what they leave of the steering effect.

The budget: e = max |y - y64| / s, where y64 is the reference in float64 on the same rounded arguments and s the sum of
the terms' sizes, |x| |W_0|^T + sum_k |c_k| |x| |Delta_k|^T and the biases'. e is at most twice that of the reference
run in the same dtypes, plus one unit roundoff of the result's. The gradients of x and the deltas are held to the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_linear_support import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    ISAS,
    needs_cpp,
    problem,
    sizes_of,
    values_and_gradients,
)
from torch import Tensor

from clp_kernels import extension, mixed_linear, mixed_linear_ref
from clp_kernels.select import CPP_DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F32, BF16)]
SIXTEEN_BITS = [BF16, F16]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of any size up to 150, zero and odd ones among them.

    No fewer than 16 outputs and inputs (or none): an error is the largest of many, as the reference's that it is
    measured by; of one entry alone that one may be zero by luck.
    """
    M = draw(st.sampled_from([0, 1, 2, 4, 16, 17, 64]) | st.integers(0, 150))
    D, N = (draw(st.sampled_from([0, 16, 64, 128]) | st.integers(16, 150)) for _ in range(2))
    x_dtype, deltas_dtype = draw(st.sampled_from([d for d in DTYPES if set(d) <= set(CPP_DTYPES)]))
    rows = draw(st.sampled_from(["one", "segments", "shuffled", "different"]))
    a = problem(M, D, N, draw(st.integers(1, 16)), x_dtype, deltas_dtype, rows, draw(st.booleans()))
    if draw(st.booleans()):
        a["bias"] = a["bias_deltas"] = None
    return a


def errors(results: dict[str, Tensor], exact: dict[str, Tensor], sizes: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of y and of the gradients of x and the deltas, in units of the sum of the terms' sizes."""
    largest = {}
    for name in ("y", "x", "deltas"):
        assert results[name].isfinite().all(), name
        ratio = (results[name].double() - exact[name]).abs() / sizes[name]
        largest[name] = ratio.nan_to_num(nan=0.0, posinf=torch.inf).max().item() if ratio.numel() else 0.0
    return largest


@needs_cpp
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(a=problems())
def test_error_budget(a):
    dy = torch.randn(a["x"].shape[0], a["deltas"].shape[0], generator=torch.Generator().manual_seed(5))
    dy = dy.to(a["x"].dtype)
    exact = values_and_gradients(mixed_linear_ref, a, F64, dy)
    sizes = values_and_gradients(mixed_linear_ref, sizes_of(a), F64, dy.abs())
    torchs = errors(values_and_gradients(mixed_linear_ref, a, None, dy), exact, sizes)
    for isa in ISAS:
        extension.set_isa(isa)
        try:
            results = values_and_gradients(mixed_linear, a, None, dy, backend="cpp")
        finally:
            extension.set_isa("best")
        for name, error in errors(results, exact, sizes).items():
            dtype = a["deltas" if name == "deltas" else "x"].dtype
            assert results[name].dtype == dtype
            budget = 2 * torchs[name] + torch.finfo(dtype).eps / 2
            assert error <= budget, f"{isa}, {name}: {error:.3g} > 2 * {torchs[name]:.3g} + one roundoff"


def cancelled_base(M: int, rows: str, dtype: torch.dtype, deltas_dtype: torch.dtype, size: float) -> dict[str, Any]:
    """Arguments whose base (standard deviation 0.04) has no effect, so that a 16-bit y can show a small delta's."""
    a = problem(M, 256, 32, 2, dtype, deltas_dtype, rows, scale=size)
    a["bias"] = a["bias_deltas"] = None
    a["base"] *= 0.04
    a["x"][:, 128:] = a["x"][:, :128]
    a["base"][:, 128:] = -a["base"][:, :128]
    return a


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("deltas_dtype", [F32, None])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_steering_effect_of_16_bits(backend, dtype, deltas_dtype, size):
    """y(c) - y(0) of deltas far below a 16-bit weight's last place: nothing rounds the mix.

    Rounded to bfloat16 it would lose 0.96 of the effect at 1e-5, 0.68 at 1e-4 and 0.02 at 1e-3.
    """
    if backend == "cpp" and dtype not in CPP_DTYPES:
        pytest.skip(f"cpp takes no {dtype}")
    for isa in ISAS if backend == "cpp" else ("",):
        for M, rows in ((1, "one"), (16, "different"), (200, "one"), (200, "segments"), (90, "shuffled")):
            a = cancelled_base(M, rows, dtype, deltas_dtype or dtype, size)
            wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in a.items()}
            exact = mixed_linear_ref(**{**wide, "base": None})
            effect = effect_of(a, backend, isa)
            # One rounding of y to 16 bits, and the float32 roundings of base products that cancel.
            cancelled = 16 * 2**-24 * (wide["x"].abs() @ wide["base"].abs().T).max()
            roundoff = torch.finfo(dtype).eps / 2
            assert (effect - exact).abs().max() <= 2 * roundoff * exact.abs().max() + cancelled, (isa, M, rows)
            assert (effect - exact).norm() <= 0.02 * exact.norm() + cancelled * exact.numel() ** 0.5, (isa, M, rows)


def effect_of(a: dict[str, Any], backend: str, isa: str) -> Tensor:
    if isa:
        extension.set_isa(isa)
    try:
        y = mixed_linear(**a, backend=backend)
        y_of_base = mixed_linear(**{**a, "coefficients": torch.zeros_like(a["coefficients"])}, backend=backend)
    finally:
        if isa:
            extension.set_isa("best")
    return y.double() - y_of_base.double()
