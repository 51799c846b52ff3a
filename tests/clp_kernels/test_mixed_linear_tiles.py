"""mixed_linear's products by tiles of bfloat16 (Intel AMX): odd sizes, what rounds, what shares no bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_linear_support import BF16, F16, F32, ISAS, needs_cpp, problem, sizes_of
from torch import Tensor

from clp_kernels import extension, mixed_linear, mixed_linear_ref

pytestmark = [
    needs_cpp,
    pytest.mark.skipif("amx_bf16" not in ISAS, reason="this processor multiplies no tiles of bfloat16 (AMX)"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def by_tiles(a: dict[str, Any], **options: Any) -> Tensor:
    assert extension.isa() == "amx_bf16"
    return mixed_linear(**a, backend="cpp", **options)


def in_float64(a: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in a.items()}


def error(y: Tensor, a: dict[str, Any]) -> float:
    """The largest error in units of the sum of the terms' sizes."""
    exact, sizes = mixed_linear_ref(**in_float64(a)), mixed_linear_ref(**in_float64(sizes_of(a)))
    return ((y.double() - exact).abs() / sizes).max().item()


@pytest.mark.parametrize("deltas_dtype", [BF16, F32, F16])
@pytest.mark.parametrize("D", [1, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("N", [1, 16, 17, 32, 33, 100])
def test_any_size(D, N, deltas_dtype):
    for M in (5, 15, 16, 17, 32, 33, 64, 70):
        for with_base in (True, False):
            a = problem(M, D, N, 3, BF16, deltas_dtype, "different", with_base)
            torchs = error(mixed_linear_ref(**a), a)
            assert error(by_tiles(a), a) <= 2 * torchs + torch.finfo(BF16).eps / 2, (M, with_base)


@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
def test_more_rows_than_one_pass_takes(deltas_dtype):
    a = problem(1500, 576, 40, 2, BF16, deltas_dtype, "different")
    y = by_tiles(a)
    assert error(y, a) <= 2 * error(mixed_linear_ref(**a), a) + torch.finfo(BF16).eps / 2
    rows = torch.tensor([0, 900, 1499])
    assert torch.equal(by_tiles({**a, "x": a["x"][rows], "row_map": a["row_map"][rows]}), y[rows])


@pytest.mark.parametrize("base_dtype", [F32, F16])
def test_a_base_of_another_dtype(base_dtype):
    a = problem(40, 96, 48, 2, BF16, BF16)
    a["base"] = torch.randn(48, 96, generator=torch.Generator().manual_seed(1)).to(base_dtype)
    assert error(by_tiles(a), a) <= 2 * error(mixed_linear_ref(**a), a) + torch.finfo(BF16).eps / 2


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("M", [16, 40])
def test_copies_keep_16_bits(dtype, M):
    """Two copies a 2^-10th apart, of which only the difference counts: each rounded to bfloat16 would lose it."""
    a = problem(M, 256, 64, 2, BF16, F32, "different", with_base=False)
    a["bias"] = a["bias_deltas"] = None
    a["deltas"][:, 1] = a["deltas"][:, 0] * (1 + 2**-10)
    a["deltas"] = a["deltas"].to(dtype)
    a["coefficients"] = torch.tensor([[-1.0, 1.0]]).repeat(M, 1)
    exact = mixed_linear_ref(**in_float64(a))
    assert (by_tiles(a).double() - exact).norm() <= 0.02 * exact.norm()
    rounded = in_float64({**a, "deltas": a["deltas"].to(BF16)})
    assert (mixed_linear_ref(**rounded) - exact).norm() > 0.5 * exact.norm(), "the test shows nothing"


@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
def test_no_value_reaches_another_row_or_output(deltas_dtype):
    """A NaN in a row of x stays in its row, one in a weight in its output: also past the ends of odd sizes."""
    a = problem(37, 50, 41, 2, BF16, deltas_dtype, "different")
    y = by_tiles(a)
    x, deltas = a["x"].clone(), a["deltas"].clone()
    x[20, 49], deltas[40, 1, 49] = torch.nan, torch.nan
    got = by_tiles({**a, "x": x, "deltas": deltas})
    reached = torch.zeros_like(got, dtype=torch.bool)
    reached[20], reached[:, 40] = True, True
    assert got[reached].isnan().all()
    assert torch.equal(got[~reached], y[~reached])


@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
def test_bits_do_not_depend_on_threads_or_on_strides(deltas_dtype):
    a = problem(60, 320, 200, 2, BF16, deltas_dtype, "different")
    wide = torch.randn(60, 3, 320, generator=torch.Generator().manual_seed(2)).to(BF16)
    a["x"] = wide[:, 1]
    assert not a["x"].is_contiguous()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_tiles({**a, "x": a["x"].contiguous()} if count == 3 else a))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradients_are_those_without_tiles():
    """Where all weightings differ the backward has no tiles: the same bits from the same arguments."""
    a = problem(32, 64, 48, 2, BF16, F32, "different")
    dy = torch.randn(32, 48, generator=torch.Generator().manual_seed(4)).to(BF16)
    results = []
    for isa in ("amx_bf16", "avx512_bf16"):
        extension.set_isa(isa)
        try:
            leaves = [a[name].clone().requires_grad_() for name in ("x", "deltas", "coefficients")]
            y = mixed_linear(leaves[0], a["base"], *leaves[1:], row_map=a["row_map"], backend="cpp")
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        finally:
            extension.set_isa("best")
    (y, *gradients), (other_y, *other_gradients) = results
    assert not torch.equal(y, other_y), "no tiles ran: the test shows nothing"
    for gradient, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
def test_few_rows_take_no_tiles(deltas_dtype):
    """Dot products read weights faster up to 4 rows: the bits of the instruction set below."""
    a = problem(5, 512, 4096, 2, BF16, deltas_dtype, "different")
    results = {}
    for isa in ("amx_bf16", "avx512_bf16"):
        extension.set_isa(isa)
        try:
            for M in (4, 5):
                few = {**a, "x": a["x"][:M], "row_map": a["row_map"][:M]}
                results[isa, M] = mixed_linear(**few, backend="cpp")
        finally:
            extension.set_isa("best")
    assert torch.equal(results["amx_bf16", 4], results["avx512_bf16", 4])
    assert not torch.equal(results["amx_bf16", 5], results["avx512_bf16", 5]), "no tiles ran: the test shows nothing"


def test_batch_invariant_calls_keep_their_bits():
    """They do not take tiles: with them or without, a row alone or among others has the same bits."""
    a = problem(40, 96, 64, 2, BF16, BF16, "different")
    whole = by_tiles(a, batch_invariant=True)
    rows = torch.tensor([3, 39])
    part = by_tiles({**a, "x": a["x"][rows], "row_map": a["row_map"][rows]}, batch_invariant=True)
    assert torch.equal(part, whole[rows])
    extension.set_isa("avx512_bf16")
    try:
        assert torch.equal(mixed_linear(**a, backend="cpp", batch_invariant=True), whole)
    finally:
        extension.set_isa("best")


@pytest.mark.parametrize("D", [0, 33])
def test_empty(D):
    a = problem(20, D, 17, 2, BF16, F32, "different")
    torch.testing.assert_close(by_tiles(a).double(), mixed_linear_ref(**in_float64(a)), rtol=1e-2, atol=1e-2)
    empty = by_tiles({**a, "x": a["x"][:0], "row_map": a["row_map"][:0]})
    assert empty.shape == (0, 17)
    a["coefficients"] = torch.zeros_like(a["coefficients"])
    zero = by_tiles({**a, "base": None, "bias": None})
    assert torch.equal(zero, torch.zeros(20, 17, dtype=BF16))
