"""mixed_linear's values and gradients against a float64 oracle, with torch's own error as the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mixed_linear_support import BF16, F16, F32, F64, ISAS, needs_cpp, problem, sizes_of, values_and_gradients

from clp_kernels import extension, mixed_linear, mixed_linear_ref

CPP = {"backend": "cpp"}
pytestmark = pytest.mark.usefixtures("poisoned_memory")

# M, D, N, K: one row, odd sizes, several blocks and panels of each kernel with rests.
SHAPES = [
    (1, 33, 7, 1),
    (3, 64, 40, 2),
    (17, 33, 7, 3),
    (70, 40, 19, 2),
    (130, 129, 50, 4),
    (9, 5, 3, 5),
    (300, 96, 33, 2),
    (520, 200, 150, 2),
]


def assert_within_budget(ours, torchs, exact, a):
    magnitudes = values_and_gradients(mixed_linear_ref, sizes_of(a), F64)
    for name, expected in exact.items():
        error, budget = (ours[name].double() - expected).abs(), (torchs[name].double() - expected).abs().max()
        # A short sum carries a few roundings of its terms' size (mix, products), however lucky torch's order was.
        floor = 4 * 2**-24 * magnitudes[name].abs().max()
        assert ours[name].dtype == torchs[name].dtype
        assert error.max() <= 2 * budget + floor, f"{name}: {error.max():.3g} > 2 * {budget:.3g} + {floor:.3g}"


@needs_cpp
@pytest.mark.parametrize("rows", ["one", "segments", "shuffled", "different"])
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F16)])
@pytest.mark.parametrize(("M", "D", "N", "K"), SHAPES)
def test_cpp(isa, M, D, N, K, x_dtype, deltas_dtype, rows):
    for with_base in (True, False):
        a = problem(M, D, N, K, x_dtype, deltas_dtype, rows, with_base)
        exact = values_and_gradients(mixed_linear_ref, a, F64)
        torchs = values_and_gradients(mixed_linear_ref, a)
        assert_within_budget(values_and_gradients(mixed_linear, a, backend="cpp"), torchs, exact, a)


@needs_cpp
@pytest.mark.parametrize("rows", ["one", "segments", "different"])
@pytest.mark.parametrize("length", [576, 2048])
@pytest.mark.parametrize("name", ["y", "x", "deltas"])
def test_long_sums_err_no_more_than_torchs(isa, name, length, rows):
    """Sums over D, N or M terms of one sign, whose partial sums grow: one by one they err 3 to 20 times more."""
    M, D, N = {"y": (200, length, 40), "x": (200, 40, length), "deltas": (length, 40, 24)}[name]
    a = problem(M, D, N, 2, F32, F32, rows)
    a = {n: t if n == "row_map" else t.abs() for n, t in a.items()}
    results = []
    for op, dtype, kwargs in ((mixed_linear_ref, F64, {}), (mixed_linear_ref, F32, {}), (mixed_linear, F32, CPP)):
        inputs = {n: t if n == "row_map" else t.to(dtype, copy=True) for n, t in a.items()}
        for wanted in ("x", "deltas"):
            inputs[wanted].requires_grad_()
        y = op(**inputs, **kwargs)
        y.backward(torch.rand(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype))
        results.append({"y": y.detach(), "x": inputs["x"].grad, "deltas": inputs["deltas"].grad}[name])
    exact, torchs, ours = results
    error, own = ((value.double() - exact).abs().max() for value in (ours, torchs))
    floor = torch.finfo(F32).eps * exact.max()
    assert error <= 2 * own + floor, f"{error:.3g} > 2 * {own:.3g} + {floor:.3g}"


@needs_cpp
@pytest.mark.parametrize("S", [1, 64, 256])
def test_many_segments_are_no_long_sum(isa, S):
    a = problem(2048, 24, 24, 2, F32, F32)
    a["row_map"] = (torch.arange(2048) * S // 2048).to(torch.int32)
    a["coefficients"] = torch.rand(S, 2, generator=torch.Generator().manual_seed(4))
    a["x"] = a["x"].abs()
    a["bias"] = a["bias_deltas"] = None

    def error(op, **kwargs):
        deltas = a["deltas"].clone().requires_grad_()
        op(**{**a, "deltas": deltas}, **kwargs).sum().backward()
        c_MK = a["coefficients"].double()[a["row_map"].long()]
        exact = (c_MK[:, :, None] * a["x"].double()[:, None, :]).sum(0).expand(24, 2, 24)
        return (deltas.grad.double() - exact).abs().max()

    assert error(mixed_linear, **CPP) <= 2 * error(mixed_linear_ref) + 2**-23 * 2048


@needs_cpp
def test_cpp_mixed_dtypes(isa):
    a = problem(20, 33, 18, 2, F32, F32)
    for base_dtype, deltas_dtype in ((BF16, BF16), (BF16, F32), (F32, BF16), (F16, F32), (F32, F16)):
        b = {**a, "base": a["base"].to(base_dtype), "deltas": a["deltas"].to(deltas_dtype)}
        exact, torchs = values_and_gradients(mixed_linear_ref, b, F64), values_and_gradients(mixed_linear_ref, b)
        assert_within_budget(values_and_gradients(mixed_linear, b, backend="cpp"), torchs, exact, b)


@pytest.mark.parametrize("rows", ["segments", "shuffled"])
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (torch.float16, torch.float16)])
def test_registered_reference_equals_plain_autograd(x_dtype, deltas_dtype, rows):
    a = problem(17, 33, 7, 3, x_dtype, deltas_dtype, rows)
    exact, torchs = values_and_gradients(mixed_linear_ref, a, F64), values_and_gradients(mixed_linear_ref, a)
    assert_within_budget(values_and_gradients(mixed_linear, a, backend="reference"), torchs, exact, a)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_deltas_give_the_plain_layers_bits(dtype, bias):
    a = problem(17, 64, 40, 2, dtype, F32)
    a["x"][3] = 0  # a row of zeros: sums of +0 and -0
    b = a["bias"] if bias else None
    if bias:
        b[:5] = -0.0
    plain = F.linear(a["x"], a["base"], b)
    y = mixed_linear(
        a["x"],
        a["base"],
        torch.zeros(40, 2, 64),
        a["coefficients"],
        b,
        bias_deltas=torch.zeros(40, 2),
        row_map=a["row_map"],
        backend="reference",
    )
    integers = torch.int32 if dtype == F32 else torch.int16
    assert torch.equal(y.view(integers), plain.view(integers))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_zero_coefficients_are_the_base(backend):
    a = problem(19, 33, 18, 2, F32, F32)
    y = mixed_linear(**{**a, "coefficients": torch.zeros_like(a["coefficients"])}, backend=backend)
    torch.testing.assert_close(y, F.linear(a["x"], a["base"], a["bias"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_non_contiguous_and_empty(backend):
    a = problem(12, 10, 6, 2, F32, F32)
    c = a["coefficients"][:3]
    x = torch.randn(10, 4, 3).permute(2, 1, 0).requires_grad_()  # [3, 4, 10]
    base, deltas = a["base"].T.contiguous().T, a["deltas"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not base.is_contiguous()
    assert not deltas.is_contiguous()
    y = mixed_linear(x, base, deltas, c, backend=backend)
    torch.testing.assert_close(y, mixed_linear_ref(x, a["base"], a["deltas"], c), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    deltas = a["deltas"].clone().requires_grad_()
    empty = mixed_linear(torch.empty(0, 4, 10), base, deltas, torch.empty(0, 2), backend=backend)
    assert empty.shape == (0, 4, 6)
    empty.sum().backward()
    assert torch.equal(deltas.grad, torch.zeros_like(deltas))


@needs_cpp
def test_an_instruction_set_that_is_missing_raises():
    assert extension.isa() == ISAS[-1]
    for name in {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"} - set(ISAS):
        with pytest.raises(ValueError, match=f"'{name}': this processor lacks it; available here: portable"):
            extension.set_isa(name)
    with pytest.raises(ValueError, match="'mmx': it must be one of"):
        extension.set_isa("mmx")
