"""The Triton back-end's forms of mixed_linear for many rows of a weighting: panels of the mix, and mixing on chip."""

from __future__ import annotations

import pytest
import torch
from mixed_linear_support import premixed
from triton_support import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    assert_same_bits,
    assert_within_budget,
    differentiate,
    is_float,
    on_device,
    poisoned_memory,
)

from clp_kernels import mixed_linear, mixed_linear_ref
from clp_kernels import mixed_linear_panels_triton as panels
from clp_kernels.select import select_form

HALF = BF16 if DEVICE == "cuda" else F16
# Of rows (and base) and deltas, M, D, N, K, S: odd sizes, one block of each kind and several, weightings in one tile.
CASES = {
    "panels": (F32, F32, 130, 33, 70, 3, 1),
    "panels, one copy": (F32, F16, 128, 64, 8, 1, 1),
    "segments": (HALF, HALF, 300, 40, 33, 2, 1),
    "segments, odd copies": (HALF, F32, 520, 70, 40, 3, 2),
    "segments, meeting": (HALF, HALF, 530, 33, 136, 1, 2),
}


def problem(x, deltas, M, D, N, K, S, *, base=True, bias=True, interleaved=False, size=1.0):
    generator = torch.Generator().manual_seed(M + D)
    rows = torch.arange(M)
    # One by one, then in short runs: each run of the deltas' gradient takes the interpreter 40 ms.
    mixed_up = torch.where(rows < 40, rows, rows // 7) % S
    found = {
        "x": torch.randn(M, D, generator=generator).to(x),
        "base": torch.randn(N, D, generator=generator).div(D**0.5).to(x) if base else None,
        "deltas": torch.randn(N, K, D, generator=generator).mul(size / D**0.5).to(deltas),
        "coefficients": torch.rand(S, K, generator=generator),
        "row_map": (mixed_up if interleaved else rows * S // M).int(),
    }
    if bias:
        found |= {"bias": torch.randn(N, generator=generator).to(x)}
        found |= {"bias_deltas": torch.randn(N, K, generator=generator).to(deltas)}
    return on_device({name: value for name, value in found.items() if value is not None or name == "base"})


@pytest.mark.parametrize(
    ("name", "given", "exact_delta"),
    [
        *((name, {}, True) for name in CASES),
        ("panels", {"base": False}, True),
        ("segments", {"base": False}, True),
        ("segments", {}, False),
        ("segments, meeting", {"base": False}, False),
        ("segments, meeting", {"interleaved": True, "bias": False}, True),
    ],
)
def test_values_and_gradients(name, given, exact_delta):
    x, _, M, D, N, K, S = case = CASES[name]
    assert select_form(M, S, (x, x), False, not exact_delta) != "streams"
    a = problem(*case, **given)
    settings = {"backend": "triton", "exact_delta": exact_delta}
    with poisoned_memory():
        ours = differentiate(mixed_linear, a, **settings)
    torchs = differentiate(mixed_linear_ref if exact_delta else premixed, a)
    exact = differentiate(mixed_linear_ref, a, F64)
    # A mix of float32 deltas is rounded to the rows' dtype as an operand.
    cut = torch.finfo(x).eps if x != F32 else 0.0
    assert_within_budget(ours, torchs, exact, max(M, D, N, K), cut)
    assert_same_bits(differentiate(mixed_linear, a, **settings), ours)


@pytest.mark.parametrize("exact_delta", [True, False])
def test_one_weighting_of_half_precision_takes_panels_where_it_may_round(exact_delta, monkeypatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4096)  # several panels
    a = problem(HALF, F32, 520, 40, 136, 2, 1)
    ours = differentiate(mixed_linear, a, backend="triton", exact_delta=exact_delta)
    torchs = differentiate(mixed_linear_ref if exact_delta else premixed, a)
    assert_within_budget(ours, torchs, differentiate(mixed_linear_ref, a, F64), 520, torch.finfo(HALF).eps)


def in_dtype(arguments, dtype):
    return {name: t if dtype is None or not is_float(t) else t.to(dtype) for name, t in arguments.items()}


@pytest.mark.parametrize("base", [True, False])
def test_small_deltas_keep_their_effect(base):
    """y(c) - y(0), projected on the exact effect, is 1; in one rounded mix of base and deltas much is lost."""
    a = problem(HALF, F32, 520, 256, 64, 2, 2, bias=False, size=1e-4 if HALF == F16 else 1e-3)
    if not base:  # a mix of two copies that differ by little
        a["deltas"] = (
            a["deltas"] * torch.tensor([1.0, -1.0], device=DEVICE)[:, None] + a.pop("base")[:, None].float() / 2
        )
        a["base"], a["coefficients"] = None, torch.tensor([[1.2, 0.8], [0.7, 1.3]], device=DEVICE)
    zero = {
        **a,
        "coefficients": torch.ones_like(a["coefficients"]) if not base else torch.zeros_like(a["coefficients"]),
    }

    def effect(op, dtype=None, **settings):
        y, y_zero = (op(**in_dtype(inputs, dtype), **settings).double() for inputs in (a, zero))
        return y - y_zero

    exact = effect(mixed_linear_ref, F64)
    kept, rounded = (
        ((effect(mixed_linear, backend="triton", exact_delta=e) * exact).sum() / exact.square().sum()).item()
        for e in (True, False)
    )
    assert kept == pytest.approx(1, abs=0.03)
    assert not 0.97 < rounded < 1.03


def test_a_row_has_its_bits_beside_any_weighting():
    a = problem(HALF, HALF, 520, 70, 40, 2, 2)
    others = {**a, "x": a["x"].clone(), "row_map": a["row_map"].clone()}
    others["x"][1::2], others["row_map"][1::2] = 7.0, 1 - a["row_map"][1::2]
    y, y_others = (mixed_linear(**inputs, backend="triton") for inputs in (a, others))
    assert torch.equal(y[::2], y_others[::2])
    assert not torch.equal(y[1::2], y_others[1::2])


@pytest.mark.parametrize("S", [1, 2])
def test_gradients_are_added_to_a_given_buffer(S):
    a = problem(HALF, F32, 520, 40, 70, 3, S, bias=False)
    expected = differentiate(mixed_linear, a, backend="triton")["deltas"]
    deltas = a["deltas"].clone().requires_grad_()
    deltas.main_grad = torch.full_like(a["deltas"], 0.5)
    y = mixed_linear(**{**a, "deltas": deltas}, backend="triton")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    y.backward(dy.to(y.device, y.dtype))
    assert deltas.grad is None
    torch.testing.assert_close(deltas.main_grad, expected + 0.5, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("M", "S", "dtypes", "batch_invariant", "rounds_mix", "form"),
    [
        (16, 16, (HALF, HALF), False, False, "streams"),
        (255, 1, (HALF, HALF), False, False, "streams"),
        (256, 1, (HALF, HALF), False, False, "segments"),
        (4096, 16, (HALF, None), False, False, "segments"),
        (4096, 17, (HALF, HALF), False, False, "streams"),
        (4096, 1, (HALF, HALF), True, False, "streams"),
        (4096, 1, (HALF, F32), False, True, "streams"),
        (4096, 1, (HALF, HALF), False, True, "panels"),
        (511, 1, (HALF, HALF), False, True, "segments"),
        (128, 1, (F32, F32), False, False, "panels"),
        (127, 1, (F32, F32), False, False, "streams"),
        (4096, 2, (F32, F32), False, True, "streams"),
    ],
)
def test_the_form_follows_from_the_shapes(M, S, dtypes, batch_invariant, rounds_mix, form):
    assert select_form(M, S, dtypes, batch_invariant, rounds_mix) == form
