"""mixed_linear of many bfloat16 rows of each weighting by tiles (Intel AMX): values, gradients, edges, what rounds."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from mixed_linear_support import BF16, F16, F32, F64, ISAS, needs_cpp, premixed, problem, sizes_of, values_and_gradients
from torch import Tensor

from clp_kernels import extension, mixed_linear, mixed_linear_ref

pytestmark = [
    needs_cpp,
    pytest.mark.skipif("amx_bf16" not in ISAS, reason="this processor multiplies no tiles of bfloat16 (AMX)"),
    pytest.mark.usefixtures("poisoned_memory"),
]


# Deltas' dtype, whether they have a base, and whether both are rounded as one.
ROUNDED = [(BF16, True, True), (F32, True, True), (F16, True, False), (BF16, False, False)]


def results_of(isa: str, a: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    extension.set_isa(isa)
    try:
        return values_and_gradients(mixed_linear, a, backend="cpp", **options)
    finally:
        extension.set_isa("best")


def errors(results: dict[str, Tensor], exact: dict[str, Tensor], sizes: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each result in units of the sum of its terms' sizes; 0 where both are zero."""
    largest = {}
    for name in exact:
        assert results[name].isfinite().all(), name
        ratios = (results[name].double() - exact[name]).abs() / sizes[name]
        largest[name] = ratios.nan_to_num(nan=0.0, posinf=torch.inf).max().item()
    return largest


def assert_within_budget(a: dict[str, Any], with_proof: bool = True, exact_delta: bool = True) -> None:
    """At most twice torch's own error, which rounds as often, and one roundoff; `with_proof`: with other bits than
    without tiles."""
    dy = torch.randn(len(a["x"]), len(a["deltas"]), generator=torch.Generator().manual_seed(5)).to(BF16)
    exact = values_and_gradients(mixed_linear_ref, a, F64, dy)
    sizes = values_and_gradients(mixed_linear_ref, sizes_of(a), F64, dy.double().abs())
    rounds_alike = mixed_linear_ref if exact_delta else premixed
    torchs = errors(values_and_gradients(rounds_alike, a, None, dy), exact, sizes)
    ours = results_of("amx_bf16", a, dy=dy, exact_delta=exact_delta)
    for name, error in errors(ours, exact, sizes).items():
        budget = 2 * torchs[name] + torch.finfo(ours[name].dtype).eps / 2
        assert error <= budget, f"{name}: {error:.3g} > 2 * {torchs[name]:.3g} + one roundoff"
    if with_proof:
        others = results_of("avx512_bf16", a, dy=dy)
        for name in ("y", "x"):
            assert not torch.equal(ours[name], others[name]), f"{name}: no tiles ran, the test shows nothing"


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
@pytest.mark.parametrize("rows", ["one", "segments", "shuffled"])
def test_values_and_gradients(rows, deltas_dtype, with_base):
    """Over the ends of blocks (256 terms and columns) and of tiles (16 and 32)."""
    for M, D, N, K in ((1100, 300, 290, 2), (901, 33, 257, 3), (1030, 513, 31, 1), (701, 70, 42, 2)):
        assert_within_budget(problem(M, D, N, K, BF16, deltas_dtype, rows, with_base))


@pytest.mark.parametrize(("deltas_dtype", "with_base", "is_rounded"), ROUNDED)
@pytest.mark.parametrize("rows", ["one", "segments", "shuffled"])
def test_base_and_mix_rounded_as_one(rows, deltas_dtype, with_base, is_rounded):
    """exact_delta=False; other sums than the mix beside a bfloat16 base take two parts all the same."""
    for M, D, N, K in ((1100, 300, 290, 2), (901, 33, 257, 3), (1030, 513, 31, 1), (701, 70, 42, 4)):
        a = problem(M, D, N, K, BF16, deltas_dtype, rows, with_base)
        assert_within_budget(a, exact_delta=False)
        exact, rounded = (results_of("amx_bf16", a, exact_delta=e) for e in (True, False))
        for name in exact:
            assert torch.equal(exact[name], rounded[name]) != (is_rounded and name in ("y", "x")), name


def test_a_rounded_mix_skips_copies_of_no_weight():
    a = problem(1300, 64, 48, 3, BF16, BF16, "segments")
    a["coefficients"][0], a["coefficients"][1:, 0] = 0.0, 0.0
    assert_within_budget(a, exact_delta=False)
    y = results_of("amx_bf16", a, exact_delta=False)["y"]
    a["deltas"][:, 0] = torch.nan  # of no weight in any row
    assert torch.equal(results_of("amx_bf16", a, exact_delta=False)["y"], y)
    rows = a["row_map"] == 0
    base = mixed_linear_ref(**{**a, "deltas": torch.zeros_like(a["deltas"])})[rows]
    torch.testing.assert_close(y[rows], base, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("deltas_dtype", [BF16, F32])
def test_small_deltas_keep_their_effect(deltas_dtype):
    """y(c) - y(0), projected on the exact effect, is 1; of deltas a thousandth of the base's size, rounded with it as
    one weight, much is lost."""
    a = problem(600, 256, 64, 2, BF16, deltas_dtype, "one")
    a["bias"] = a["bias_deltas"] = None
    a["base"] = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).mul(0.04).to(BF16)
    a["deltas"] = torch.randn(64, 2, 256, generator=torch.Generator().manual_seed(2)).mul(4e-5).to(deltas_dtype)
    a["coefficients"] = torch.tensor([[0.5, 0.5]])
    zero = {**a, "coefficients": torch.zeros(1, 2)}
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in a.items()}
    exact = mixed_linear_ref(**wide) - mixed_linear_ref(**{**wide, "coefficients": torch.zeros(1, 2).double()})

    def share(exact_delta: bool) -> float:
        y, y_zero = (results_of("amx_bf16", inputs, exact_delta=exact_delta)["y"].double() for inputs in (a, zero))
        return (((y - y_zero) * exact).sum() / exact.square().sum()).item()

    assert share(True) == pytest.approx(1, abs=0.1)
    assert not 0.8 < share(False) < 1.2


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_any_number_of_copies_and_zero_coefficients(K):
    a = problem(1300, 64, 48, K, BF16, BF16, "segments")
    a["coefficients"][0] = 0.0
    a["coefficients"][1:, 0] = 0.0
    assert_within_budget(a, with_proof=K > 1)


def test_one_row_more_than_packed_once():
    """2048 rows of dy are packed once for all tiles of the weight gradient, more for each of them."""
    for M in (2048, 2049):
        assert_within_budget(problem(M, 40, 40, 2, BF16, BF16, "one"))


def test_more_rows_than_one_pass_takes():
    """A pass over the weights takes 1024 rows of this size; a row's bits do not depend on its place in one."""
    a = problem(2600, 96, 80, 2, BF16, BF16, "one")
    y = results_of("amx_bf16", a)["y"]
    rows = torch.arange(1000, 2100)
    part = results_of("amx_bf16", {**a, "x": a["x"][rows], "row_map": a["row_map"][rows]})["y"]
    assert torch.equal(part, y[rows])


def test_a_float32_base_keeps_16_bits():
    """Under autocast x alone is bfloat16. The base's halves cancel but for a 2^-10th, which a bfloat16 would lose."""
    a = problem(600, 256, 64, 1, BF16, F32, "one", scale=1e-6)
    a["bias"] = a["bias_deltas"] = None
    a["x"][:, 128:] = a["x"][:, :128]
    half = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).to(BF16).float()
    a["base"] = torch.cat([half, -half * (1 + 2**-10)], dim=1)
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in a.items()}
    exact = mixed_linear_ref(**wide)
    assert (results_of("amx_bf16", a)["y"].double() - exact).norm() <= 0.02 * exact.norm()
    rounded = {**wide, "base": a["base"].to(BF16).double()}
    assert (mixed_linear_ref(**rounded) - exact).norm() > 0.5 * exact.norm(), "the test shows nothing"


def test_no_value_reaches_another_row_or_output():
    """A NaN in a row of x stays in its row, one in a weight in its output: also past the ends of odd sizes."""
    a = problem(700, 50, 41, 2, BF16, BF16, "segments")
    clean = results_of("amx_bf16", a)["y"]
    x, deltas = a["x"].clone(), a["deltas"].clone()
    x[20, 49], deltas[40, 1, 49] = torch.nan, torch.nan
    got = results_of("amx_bf16", {**a, "x": x, "deltas": deltas})["y"]
    reached = torch.zeros_like(got, dtype=torch.bool)
    reached[20], reached[:, 40] = True, True
    assert got[reached].isnan().all()
    assert torch.equal(got[~reached], clean[~reached])


def test_tiles_past_the_ends_are_zero():
    """In memory full of NaN, of which nothing may reach a sum: zero times it is no zero."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("this C library does not fill new memory")
    libc.mallopt(-6, 0x100)  # M_PERTURB: bytes of 0xff; poisoned_memory's, 3e38, would become zero; it resets this
    for M, D, N in ((701, 70, 42), (715, 42, 70), (650, 37, 33)):
        assert_within_budget(problem(M, D, N, 2, BF16, BF16, "segments"))


@pytest.mark.parametrize("rows", ["one", "segments"])
def test_bits_do_not_depend_on_threads(rows):
    a, results, threads = problem(800, 320, 600, 2, BF16, BF16, rows), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(results_of("amx_bf16", a))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in ("y", "x", "deltas"):
            assert torch.equal(results[0][name], other[name]), name


@pytest.mark.parametrize(("D", "N"), [(0, 17), (33, 0)])
def test_empty_sizes(D, N):
    a = problem(300, D, N, 2, BF16, BF16, "one")
    results = results_of("amx_bf16", a)
    exact = values_and_gradients(mixed_linear_ref, a, F64)
    for name, value in exact.items():
        assert results[name].shape == value.shape
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(results[name].double(), value, rtol=0.0, atol=0.02 * largest)


def test_main_grad_is_added_to():
    """Into a float32 buffer, unrounded."""
    a = problem(640, 70, 50, 2, BF16, BF16, "segments")
    dy = torch.randn(640, 50, generator=torch.Generator().manual_seed(3)).to(BF16)
    buffers = []
    for isa in ("amx_bf16", "avx512_bf16"):
        deltas = a["deltas"].clone().requires_grad_()
        deltas.main_grad = torch.ones(50, 2, 70)
        extension.set_isa(isa)
        try:
            mixed_linear(a["x"], a["base"], deltas, a["coefficients"], row_map=a["row_map"], backend="cpp").backward(dy)
        finally:
            extension.set_isa("best")
        buffers.append(deltas.main_grad)
    c = a["coefficients"].double()[a["row_map"].long()]
    exact = torch.einsum("mk,mn,md->nkd", c, dy.double(), a["x"].double())
    sizes = torch.einsum("mk,mn,md->nkd", c.abs(), dy.double().abs(), a["x"].double().abs())
    assert ((buffers[0].double() - 1 - exact).abs() / sizes).max() <= 1e-5
    assert not torch.equal(*buffers), "no tiles ran: the test shows nothing"
