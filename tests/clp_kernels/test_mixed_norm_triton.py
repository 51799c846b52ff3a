"""The Triton launchers of mixed_norm against a float64 oracle: interpreted without a GPU, compiled on one."""

from __future__ import annotations

import pytest
import torch
from triton_support import (
    BF16,
    DEVICE,
    DTYPES,
    F16,
    F32,
    F64,
    Arguments,
    assert_same_bits,
    assert_within_budget,
    differentiate,
    far_apart,
    on_cpu_alone,
    on_device,
    poisoned_memory,
)

from clp_kernels import mixed_norm, mixed_norm_ref
from clp_kernels import mixed_norm_triton as launchers

# M, D, K: one row; a row of one value under more copies than a block holds; several splits of rows and blocks of D.
SHAPES = [(1, 33, 1), (5, 1, 9), (70, 40, 2), (6, 1100, 3)]
SETTINGS = {
    "llama": {"kind": "rms", "cast_before_scale": True},
    "gemma": {"kind": "rms", "offset": 1.0},
    "layer": {"kind": "layer", "eps": 1e-5},
}
TRITON = {"backend": "triton"}


def problem(M: int, D: int, K: int, dtype: torch.dtype = F32, deltas: torch.dtype = F32) -> Arguments:
    generator = torch.Generator().manual_seed(M * 7 + K)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return on_device(
        {
            "x": (randn(M, D) + 0.3).to(dtype),
            "weight": (1 + 0.2 * randn(D)).to(dtype),
            "weight_deltas": (0.1 * randn(D, K)).to(deltas),
            "coefficients": randn(5, K),  # negative and large ones too
            "bias": randn(D).to(dtype),
            "bias_deltas": (0.1 * randn(D, K)).to(deltas),
            "row_map": torch.randint(0, 4, (M,), generator=generator).to(torch.int32),  # no row has weighting 4
        }
    )


def check(a: Arguments, **settings: object) -> None:
    exact, torchs = differentiate(mixed_norm_ref, a, F64, **settings), differentiate(mixed_norm_ref, a, **settings)
    with poisoned_memory():
        ours = differentiate(mixed_norm, a, **settings, **TRITON)
    assert_within_budget(ours, torchs, exact, max(a["x"].shape))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "deltas"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, deltas, settings):
    check(problem(*shape, dtype, deltas), **settings)


@pytest.mark.parametrize("missing", [["weight"], ["bias"], ["bias_deltas"], ["bias", "bias_deltas", "weight"]], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_parts_may_be_missing(kind, missing):
    check({**problem(9, 20, 2), **dict.fromkeys(missing)}, kind=kind)


def arguments_of(a: Arguments) -> tuple[list, list]:
    """The launchers' arguments before and after the settings' place: those of forward, those of backward but dy."""
    forward = [a[n] for n in ("x", "weight", "weight_deltas", "coefficients", "row_map", "bias", "bias_deltas")]
    return forward, [*forward[:5], forward[6]]


def launch(a: Arguments, dy: torch.Tensor, *needs: bool) -> Arguments:
    forward, backward = arguments_of(a)
    settings = (1e-5, True, 0.5, False)
    y = launchers.forward(*forward, *settings)
    names = ("x", "weight", "weight_deltas", "bias", "bias_deltas", "coefficients")
    gradients = launchers.backward(dy, *backward, *settings, *(needs or (True,) * 6))
    return {"y": y, **dict(zip(names, gradients, strict=True))}


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    a, dy = problem(9, 20, 2), torch.randn(9, 1, device=DEVICE).expand(9, 20)
    a["row_map"] = a["row_map"][:1].expand(9)
    strided = {n: a[n].T.contiguous().T for n in ("x", "weight_deltas", "coefficients", "bias_deltas")}
    strided |= {n: torch.stack([a[n], a[n]], 1)[:, 0] for n in ("weight", "bias")}
    assert not any(t.is_contiguous() for t in strided.values())
    expected = launch({**a, "row_map": a["row_map"].contiguous()}, dy.contiguous())
    assert_same_bits(launch({**a, **strided}, dy), expected)


@on_cpu_alone
@pytest.mark.parametrize("name", ["x", "weight", "weight_deltas", "bias", "bias_deltas", "coefficients", "dy"])
def test_offsets_beyond_32_bits(name):
    a, dy = problem(3, 3, 2), torch.randn(3, 3)
    a["coefficients"], a["row_map"] = a["coefficients"][:3], torch.tensor([0, 2, 1], dtype=torch.int32)
    expected = launch(a, dy)
    if name == "dy":
        dy = far_apart(dy)
    else:
        a[name] = far_apart(a[name])
    assert_same_bits(launch(a, dy), expected)


def test_a_row_has_its_bits_in_any_batch():
    a = problem(70, 1100, 2)
    dy = torch.randn(70, 1100, device=DEVICE)
    expected = launch(a, dy, True, *(False,) * 5)
    others = {**a, "x": torch.full_like(a["x"], torch.nan), "row_map": a["row_map"].roll(1)}
    dys = torch.full_like(dy, torch.inf)
    for m in (0, 37, 69):
        others["x"][m], others["row_map"][m], dys[m] = a["x"][m], a["row_map"][m], dy[m]
    alone = {**a, "x": a["x"][37:38], "row_map": a["row_map"][37:38]}
    in_others, by_itself = launch(others, dys, True, *(False,) * 5), launch(alone, dy[37:38], True, *(False,) * 5)
    for name in ("y", "x"):
        assert torch.equal(in_others[name][[0, 37, 69]], expected[name][[0, 37, 69]])
        assert torch.equal(by_itself[name][0], expected[name][37])


def test_two_runs_give_the_same_bits():
    a, dy = problem(70, 40, 2), torch.randn(70, 40, device=DEVICE)
    assert_same_bits(launch(a, dy), launch(a, dy))


def test_many_rows_err_no_more_than_torchs():
    """Sums of one sign over 300 rows, whose partial sums grow."""
    a = problem(300, 16, 1)
    a = {n: t if n == "row_map" else t.abs() for n, t in a.items()}
    results = []
    for op, dtype, settings in ((mixed_norm_ref, F64, {}), (mixed_norm_ref, F32, {}), (mixed_norm, F32, TRITON)):
        inputs = {n: t if n == "row_map" else t.to(dtype, copy=True).requires_grad_() for n, t in a.items()}
        op(**inputs, **settings).sum().backward()
        results.append({n: t.grad for n, t in inputs.items() if n != "row_map"})
    exact, torchs, ours = results
    for name, expected in exact.items():
        error, own = ((v[name].double() - expected).abs().max() for v in (ours, torchs))
        assert error <= 2 * own + torch.finfo(F32).eps * expected.abs().max(), name


@pytest.mark.parametrize("size", [1e-4, 1e-3])
@pytest.mark.parametrize("dtype", [F16] + [BF16] * (DEVICE == "cuda"))
def test_steering_effect_survives_16_bits(dtype, size):
    """y(c) - y(0) projected on the exact effect is 1; of a mix rounded beside weights near 1 much is lost."""
    M, D = 64, 1024
    generator = torch.Generator().manual_seed(2)
    a = on_device({"x": torch.randn(M, D, generator=generator).to(dtype), "c": torch.tensor([0.7, 0.3])})
    weight = (1 + 0.2 * torch.randn(D, generator=generator)).to(DEVICE, dtype)
    deltas = (size * torch.randn(D, 1, generator=generator).sign()).to(DEVICE).expand(D, 2)
    y, y_zero = (mixed_norm(a["x"], weight, deltas, a["c"] * on, **TRITON).double() for on in (1, 0))
    effect = mixed_norm_ref(a["x"].double(), None, deltas.double(), a["c"].double())
    # The roundings of y, of eps / 4 each, are independent of the effect of M D = 2^16 values.
    noise = torch.finfo(dtype).eps / 4 / size / (M * D) ** 0.5
    assert ((y - y_zero) * effect).sum() / effect.square().sum() == pytest.approx(1, abs=0.01 + 4 * noise)


def test_gradients_that_nobody_asked_for_are_none():
    a, dy = problem(3, 8, 2), torch.randn(3, 8, device=DEVICE)
    expected = launch(a, dy)
    names = [n for n in expected if n != "y"]
    for wanted in names:
        found = launch(a, dy, *(name == wanted for name in names))
        assert torch.equal(found[wanted], expected[wanted])
        assert all(found[name] is None for name in names if name != wanted)


def test_no_rows():
    a = problem(3, 8, 2)
    empty = {**a, "x": a["x"][:0], "row_map": a["row_map"][:0]}
    for name, value in launch(empty, empty["x"]).items():
        expected = torch.empty(0, 8, device=DEVICE) if name in ("x", "y") else torch.zeros_like(a[name])
        assert torch.equal(value, expected), name


def test_what_the_kernels_do_not_take_is_named():
    a = problem(3, 8, 2)
    with pytest.raises(ValueError, match=r"bias_deltas is torch\.float64"):
        launch({**a, "bias_deltas": a["bias_deltas"].double()}, a["x"])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"raw bits.*weight is torch\.bfloat16"):
            launch({**a, "weight": a["weight"].bfloat16()}, a["x"])
