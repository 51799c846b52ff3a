"""The Triton launchers of mixed_embedding against a float64 oracle: interpreted without a GPU, compiled on one."""

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
    untouched_memory,
)

from clp_kernels import mixed_embedding, mixed_embedding_ref
from clp_kernels import mixed_embedding_triton as launchers

# M, V, D, K: one position; ids that repeat over a block's positions and ids that never occur; several blocks of D.
SHAPES = [(1, 5, 33, 1), (70, 3, 40, 2), (12, 30, 1, 5), (7, 9, 600, 2)]
TRITON = {"backend": "triton"}


def problem(
    M: int, V: int, D: int, K: int, dtype: torch.dtype = F32, deltas: torch.dtype = F32, *, with_base: bool = True
) -> Arguments:
    generator = torch.Generator().manual_seed(M * 7 + K)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return on_device(
        {
            "base": randn(V, D).to(dtype) if with_base else None,
            "deltas": (0.1 * randn(V, K, D)).to(deltas),
            "coefficients": randn(5, K),  # negative and large ones too
            "ids": torch.randint(0, V, (M,), generator=generator),
            "row_map": torch.randint(0, 4, (M,), generator=generator).to(torch.int32),  # no position has weighting 4
        }
    )


def check(a: Arguments, **settings: object) -> Arguments:
    torchs = differentiate(mixed_embedding_ref, a, **settings)
    exact = differentiate(mixed_embedding_ref, a, F64, **settings)
    with poisoned_memory():
        ours = differentiate(mixed_embedding, a, **settings, **TRITON)
    assert_within_budget(ours, torchs, exact, max(len(a["ids"]), a["deltas"].shape[2]))
    return ours


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("dtype", "deltas"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, deltas, with_base):
    check(problem(*shape, dtype, deltas, with_base=with_base))


@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_padding_gets_no_gradient(padding_idx):
    a = problem(40, 4, 20, 2)
    padded, plain = check(a, padding_idx=padding_idx), check(a)
    for name in ("base", "deltas"):
        assert torch.equal(padded[name][padding_idx], torch.zeros_like(padded[name][padding_idx]))
        assert plain[name][padding_idx].abs().sum() > 0
    assert torch.equal(padded["coefficients"], plain["coefficients"])


def launch(a: Arguments, dy: torch.Tensor, main_grad: torch.Tensor | None = None, *needs: bool) -> Arguments:
    ids, base, deltas, c, row_map = (a[n] for n in ("ids", "base", "deltas", "coefficients", "row_map"))
    y = launchers.forward(ids, base, deltas, c, row_map)
    found = launchers.backward(dy, ids, deltas, c, row_map, -1, *(needs or (True,) * 3), main_grad)
    return {"y": y, **dict(zip(("base", "deltas", "coefficients"), found, strict=True))}


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    a, dy = problem(12, 7, 20, 2), torch.randn(12, 1, device=DEVICE).expand(12, 20)
    a["row_map"] = a["row_map"][:1].expand(12)
    strided = {n: a[n].T.contiguous().T for n in ("base", "coefficients")}
    strided["deltas"] = a["deltas"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided["ids"] = a["ids"].repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in strided.values())
    expected = launch({**a, "row_map": a["row_map"].contiguous()}, dy.contiguous())
    assert_same_bits(launch({**a, **strided}, dy), expected)


@on_cpu_alone
@pytest.mark.parametrize("name", ["base", "deltas", "coefficients", "dy"])
def test_offsets_beyond_32_bits(name):
    a, dy = problem(3, 3, 4, 2), torch.randn(3, 4)
    a["ids"], a["row_map"] = torch.tensor([0, 2, 1]), torch.tensor([2, 1, 0], dtype=torch.int32)
    a["coefficients"] = a["coefficients"][:3]
    expected = launch(a, dy)
    if name == "dy":
        dy = far_apart(dy)
    else:
        a[name] = far_apart(a[name])
    assert_same_bits(launch(a, dy), expected)


@on_cpu_alone
def test_the_gradients_rows_beyond_32_bits():
    V, K, D = 2**21 + 1, 2, 512  # the last token's row starts at element 2^31
    deltas, main_grad = torch.zeros(1).expand(V, K, D), untouched_memory(V * K * D).view(V, K, D)
    ids, row_map, c = torch.tensor([V - 1, V - 1]), torch.zeros(2, dtype=torch.int32), torch.tensor([[0.5, -2.0]])
    dy = torch.randn(2, D)
    launchers.backward(dy, ids, deltas, c, row_map, -1, False, True, False, main_grad)
    torch.testing.assert_close(main_grad[-1], c[0][:, None] * dy.sum(0))


def test_main_grad_is_added_to_in_float32():
    a = problem(40, 6, 20, 2, F16, F16)
    dy = torch.randn(40, 20, device=DEVICE).half()
    start = torch.randn(6, 2, 20, device=DEVICE)
    wide = {**a, "deltas": a["deltas"].float()}  # its gradient is not rounded
    main_grad = start.clone()
    assert launch(a, dy, main_grad)["deltas"] is None
    assert torch.equal(main_grad, start + launch(wide, dy)["deltas"])
    deltas = a["deltas"].clone().requires_grad_()
    deltas.main_grad = start.clone()
    y = mixed_embedding(**{**a, "deltas": deltas}, **TRITON)
    y.backward(dy)
    assert deltas.grad is None
    assert torch.equal(deltas.main_grad, main_grad)
    a["ids"] = torch.full_like(a["ids"], 4)
    before = main_grad.clone()
    launch(a, dy, main_grad, False, True, False)
    touched = (main_grad != before).flatten(1).any(1)
    assert touched.tolist() == [False] * 4 + [True, False]


def test_a_position_does_not_depend_on_its_neighbours():
    a, dy = problem(40, 50, 600, 2), torch.randn(40, 600, device=DEVICE)
    a["ids"][5] = 49
    expected = launch(a, dy)
    others = {**a, "ids": a["ids"].roll(3) % 49, "row_map": a["row_map"].roll(1)}
    dys = torch.full_like(dy, torch.nan)
    others["ids"][5], others["row_map"][5], dys[5] = 49, a["row_map"][5], dy[5]
    found = launch(others, dys)
    assert torch.equal(found["y"][5], expected["y"][5])
    occurs_elsewhere = (a["ids"] == 49).sum() > 1
    assert not occurs_elsewhere
    for name in ("base", "deltas"):
        assert torch.equal(found[name][49], expected[name][49])


def test_two_runs_give_the_same_bits():
    a, dy = problem(70, 3, 40, 2), torch.randn(70, 40, device=DEVICE)
    assert_same_bits(launch(a, dy), launch(a, dy))


def test_many_positions_of_one_id_err_no_more_than_torchs():
    """Sums of one sign over 1000 positions, whose partial sums grow."""
    a = problem(1000, 2, 24, 2)
    a = {n: t.abs() for n, t in a.items()}
    dy = torch.rand(1000, 24, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    results = []
    for op, dtype, settings in (
        (mixed_embedding_ref, F64, {}),
        (mixed_embedding_ref, F32, {}),
        (mixed_embedding, F32, TRITON),
    ):
        inputs = {n: t.to(dtype, copy=True).requires_grad_() if t.is_floating_point() else t for n, t in a.items()}
        op(**inputs, **settings).backward(dy.to(dtype))
        results.append({n: inputs[n].grad for n in ("base", "deltas", "coefficients")})
    exact, torchs, ours = results
    for name, expected in exact.items():
        error, own = ((v[name].double() - expected).abs().max() for v in (ours, torchs))
        assert error <= 2 * own + torch.finfo(F32).eps * expected.abs().max(), name


def test_what_has_no_part_is_not_read():
    """Rows of ids that do not occur, and copies whose coefficient is 0."""
    a = problem(20, 30, 33, 3)
    a["coefficients"][:, 1] = 0
    expected = mixed_embedding_ref(**a)
    unused = torch.ones(30, dtype=torch.bool, device=DEVICE).index_fill(0, a["ids"], False)
    assert unused.any()
    a["base"][unused] = a["deltas"][unused] = a["deltas"][:, 1] = torch.nan
    torch.testing.assert_close(mixed_embedding(**a, **TRITON), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("dtype", [F16] + [BF16] * (DEVICE == "cuda"))
def test_steering_effect_survives_16_bits(dtype, size):
    """The mix is formed in float32: it is rounded once, alone or with the base it is added to."""
    V, D = 64, 64
    generator = torch.Generator().manual_seed(2)
    ids = torch.arange(V, device=DEVICE)
    deltas = (size * (1 + torch.rand(V, 2, D, generator=generator))).to(DEVICE)
    base = (0.04 * torch.randn(V, D, generator=generator)).to(DEVICE, dtype)
    c = torch.rand(V, 2, generator=generator).to(DEVICE)
    y = mixed_embedding(ids, base, deltas, c, **TRITON)
    exact = mixed_embedding_ref(ids, None, deltas.double(), c.double())
    # To nearest, but where the sum lies within a float32 rounding of the middle of two neighbours.
    assert (y != (base.double() + exact).to(dtype)).double().mean() <= 1e-3


def test_gradients_that_nobody_asked_for_are_none():
    a, dy = problem(12, 7, 20, 2), torch.randn(12, 20, device=DEVICE)
    expected, names = launch(a, dy), ["base", "deltas", "coefficients"]
    for wanted in names:
        found = launch(a, dy, None, *(name == wanted for name in names))
        assert torch.equal(found[wanted], expected[wanted])
        assert all(found[name] is None for name in names if name != wanted)


def test_no_positions():
    a = problem(3, 5, 8, 2)
    empty = {**a, "ids": a["ids"][:0], "row_map": a["row_map"][:0]}
    for name, value in launch(empty, torch.empty(0, 8, device=DEVICE)).items():
        expected = torch.empty(0, 8, device=DEVICE) if name == "y" else torch.zeros_like(a[name])
        assert torch.equal(value, expected), name


def test_what_the_kernels_do_not_take_is_named():
    a = problem(3, 5, 8, 2)
    dy = torch.randn(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"base is torch\.float64"):
        launch({**a, "base": a["base"].double()}, dy)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"raw bits.*deltas is torch\.bfloat16"):
            launch({**a, "deltas": a["deltas"].bfloat16()}, dy)
        with pytest.raises(IndexError, match=r"ids hold 5, outside \[0, 5\)"):
            launch({**a, "ids": a["ids"] + 5 - a["ids"].max()}, dy)
