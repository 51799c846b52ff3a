"""The Triton launchers of low_rank_linear against a float64 oracle: interpreted without a GPU, compiled on one."""

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

from clp_kernels import low_rank_linear, low_rank_linear_ref
from clp_kernels import low_rank_linear_triton as launchers

# M, D, N, R: one row; a shrink in several splits; more ranks than a block; a factor's gradient in several splits; no
# rank, no input.
SHAPES = [(1, 33, 7, 3), (3, 1100, 7, 5), (17, 40, 70, 66), (1040, 12, 9, 2), (5, 24, 10, 0), (4, 0, 6, 2)]
TRITON = {"backend": "triton"}
ALL = (True,) * 5


def problem(
    M: int, D: int, N: int, R: int, x: torch.dtype = F32, factors: torch.dtype = F32, *, with_base: bool = True
) -> Arguments:
    generator = torch.Generator().manual_seed(M * 7 + R)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return on_device(
        {
            "x": randn(M, D).to(x),
            "base": randn(N, D).to(x) if with_base else None,
            "down": randn(R, D).to(factors),
            "up": (0.3 * randn(N, R)).to(factors),
            "gates": 3 * randn(5, R),  # negative and large ones too
            "bias": randn(N).to(x),
            "row_map": torch.randint(0, 4, (M,), generator=generator).to(torch.int32),  # no row has weighting 4
        }
    )


def without_empty(values: Arguments) -> Arguments:
    return {name: value for name, value in values.items() if value.numel()}


def check(a: Arguments) -> None:
    exact, torchs = differentiate(low_rank_linear_ref, a, F64), differentiate(low_rank_linear_ref, a)
    with poisoned_memory():
        ours = differentiate(low_rank_linear, a, **TRITON)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in exact.items()}
    cut = torch.finfo(a["x"].dtype).eps if DEVICE == "cuda" else 0.0  # 2^-10 or more: TF32's cut
    terms = max(*a["x"].shape, len(a["up"]))
    assert_within_budget(*map(without_empty, (ours, torchs, exact)), terms, cut)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("x", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, x, factors, with_base):
    check(problem(*shape, x, factors, with_base=with_base))


@pytest.mark.parametrize("M", [3, 40])
def test_any_mix_of_dtypes(M):
    a = problem(M, 33, 18, 6)
    for casts in ({"base": F16, "down": F16}, {"x": F16, "up": F16}, {"x": F16, "base": F16, "bias": F32}):
        check({name: t.to(casts.get(name, t.dtype)) for name, t in a.items()})
    check({**a, "bias": None})


def launch(a: Arguments, dy: torch.Tensor, needs: tuple[bool, ...] = ALL) -> Arguments:
    names = ("x", "base", "down", "up", "gates")
    x, base, down, up, gates = (a[n] for n in names)
    y, shrink = launchers.forward(x, base, down, up, gates, a["row_map"], a["bias"], True)
    found = launchers.backward(dy, shrink, x, base, down, up, gates, a["row_map"], needs)
    return {"y": y, "shrink": shrink, **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("D", [40, 1100])
def test_strided_inputs_give_the_bits_of_contiguous_ones(D):
    a, dy = problem(9, D, 7, 5), torch.randn(9, 1, device=DEVICE).expand(9, 7)
    a["row_map"] = a["row_map"][:1].expand(9)
    strided = {n: a[n].T.contiguous().T for n in ("x", "base", "down", "up", "gates")}
    strided["bias"] = torch.stack([a["bias"], a["bias"]], 1)[:, 0]
    assert not any(t.is_contiguous() for t in strided.values())
    expected = launch({**a, "row_map": a["row_map"].contiguous()}, dy.contiguous())
    found = launch({**a, **strided}, dy)
    for values in (expected, found):
        torch.testing.assert_close(values.pop("base"), dy.T @ a["x"])  # torch's GEMM, which strides may change
    assert_same_bits(found, expected)


@on_cpu_alone
@pytest.mark.parametrize("name", ["x", "base", "down", "up", "gates", "bias", "dy"])
def test_offsets_beyond_32_bits(name):
    a, dy = problem(3, 3, 3, 3), torch.randn(3, 3)
    a["gates"], a["row_map"] = a["gates"][:3], torch.tensor([0, 2, 1], dtype=torch.int32)
    needs = (True, False, True, True, True)  # the base's gradient is torch's
    expected = launch(a, dy, needs)
    if name == "dy":
        dy = far_apart(dy)
    else:
        a[name] = far_apart(a[name])
    found = launch(a, dy, needs)
    assert found.pop("base") is None
    assert expected.pop("base") is None
    assert_same_bits(found, expected)


@pytest.mark.parametrize("M", [16, 40])
def test_a_row_does_not_depend_on_its_neighbours(M):
    a, dy = problem(M, 1100, 65, 5), torch.randn(M, 65, device=DEVICE)
    needs = (True, False, False, False, False)
    others = {**a, "x": torch.full_like(a["x"], torch.nan), "row_map": a["row_map"].roll(1)}
    dys = torch.full_like(dy, torch.inf)
    others["x"][5], others["row_map"][5], dys[5] = a["x"][5], a["row_map"][5], dy[5]
    expected, found = launch(a, dy, needs), launch(others, dys, needs)
    for name in ("y", "shrink", "x"):
        assert torch.equal(found[name][5], expected[name][5]), name


@pytest.mark.parametrize("M", [3, 1040])
def test_two_runs_give_the_same_bits(M):
    a, dy = problem(M, 1100 if M == 3 else 12, 9, 5), torch.randn(M, 9, device=DEVICE)
    assert_same_bits(launch(a, dy), launch(a, dy))


@pytest.mark.parametrize("effect_size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("dtype", [F16] + [BF16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("M", [16, 64])
def test_steering_effect_survives_a_16_bit_y(M, dtype, effect_size):
    """y(g) - y(0) projected on the exact effect is 1: y is rounded once, from the float32 sum of both terms."""
    a = problem(M, 256, 512, 16, dtype, F32)
    a |= {"base": (0.04 * a["base"].float()).to(dtype), "up": effect_size * a["up"], "bias": None}
    zero = {**a, "gates": torch.zeros_like(a["gates"])}
    effect = low_rank_linear(**a, **TRITON).double() - low_rank_linear(**zero, **TRITON).double()
    wide = {n: t.double() for n, t in a.items() if n in ("x", "down", "up", "gates")}
    exact = low_rank_linear_ref(**{**a, **wide, "base": None})
    # The roundings of y, of about eps / 4 each, are independent of the effect of M N values.
    noise = torch.finfo(dtype).eps / 4 / exact.std() / exact.numel() ** 0.5
    share = (effect * exact).sum() / exact.square().sum()
    assert share.item() == pytest.approx(1, abs=0.005 + 4 * noise.item())


def test_batch_invariant_rows_keep_their_bits_in_any_batch(monkeypatch):
    """Alone, in a batch of few rows (a small tile) and in one of many, where the shrink would take fewer splits."""
    monkeypatch.setattr(launchers, "_SPLIT", 32)
    a = problem(150, 300, 10, 200)
    dy = torch.randn(150, 10, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(rows: slice) -> list[torch.Tensor]:
        x = a["x"][rows].clone().requires_grad_()
        y = low_rank_linear(**{**a, "x": x, "row_map": a["row_map"][rows]}, **TRITON, batch_invariant=True)
        y.backward(dy[rows])
        return [y.detach(), x.grad]

    whole = run(slice(None))
    for rows in (slice(7, 8), slice(3, 40)):
        for part, expected in zip(run(rows), whole, strict=True):
            assert torch.equal(part, expected[rows]), rows


def test_gradients_that_nobody_asked_for_are_none():
    a, dy = problem(9, 20, 7, 5), torch.randn(9, 7, device=DEVICE)
    expected, names = launch(a, dy), ["x", "base", "down", "up", "gates"]
    for wanted in names:
        found = launch(a, dy, tuple(name == wanted for name in names))
        assert torch.equal(found[wanted], expected[wanted])
        assert all(found[name] is None for name in names if name != wanted)


@pytest.mark.parametrize("D", [20, 1100])
def test_y_is_the_same_where_the_shrink_is_not_kept(D):
    a = problem(9, D, 7, 5)
    arguments = [a[name] for name in ("x", "base", "down", "up", "gates", "row_map", "bias")]
    (y, shrink), (alone, nothing) = (launchers.forward(*arguments, keep_shrink) for keep_shrink in (True, False))
    assert torch.equal(alone, y)
    torch.testing.assert_close(shrink, a["x"] @ a["down"].T)
    assert nothing.numel() == 0


def test_no_rows():
    a = problem(3, 8, 6, 2)
    empty = {**a, "x": a["x"][:0], "row_map": a["row_map"][:0]}
    found = launch(empty, torch.empty(0, 6, device=DEVICE))
    assert found.pop("y").shape == (0, 6)
    assert found.pop("shrink").shape == (0, 2)
    for name, value in found.items():
        assert torch.equal(value, torch.zeros_like(empty[name])), name


@pytest.mark.parametrize(
    ("programs", "reduced", "splits"), [(1, 0, 1), (1, 511, 1), (2, 4096, 8), (64, 4096, 2), (500, 4096, 1)]
)
def test_splits_cover_what_is_reduced(programs, reduced, splits):
    count, size = launchers.select_splits(programs, reduced, 32)
    assert count == splits
    assert size % 32 == 0
    assert (count - 1) * size < max(reduced, 1) <= count * size


def test_what_the_kernels_do_not_take_is_named():
    a = problem(3, 8, 6, 2)
    dy = torch.randn(3, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"up is torch\.float64"):
        launch({**a, "up": a["up"].double()}, dy)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"raw bits.*base is torch\.bfloat16"):
            launch({**a, "base": a["base"].bfloat16()}, dy)
