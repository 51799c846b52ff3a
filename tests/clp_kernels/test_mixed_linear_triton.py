"""The Triton launchers of mixed_linear against a float64 oracle: interpreted without a GPU, compiled (and bf16) on one.

The budget is twice torch's own error in the same dtype, plus one rounding of the largest result to the rows' dtype
(which bounds TF32's cut of a float32 operand beside 16-bit rows, 2^-10), plus a float32 sum's walk of sqrt(terms).
"""

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its first import

import triton

import clp_kernels
from clp_kernels import mixed_linear_triton as launchers
from clp_kernels.launch_triton import INTERPRETED

# Triton decorates its own functions (tl.sum) at its first import, which `import clp_kernels` causes through torch.
# A variable set after that leaves half of Triton compiled, and every test below would fail for the wrong reason.
is_interpreted = {INTERPRETED, not isinstance(triton.language.sum, triton.JITFunction)}
if is_interpreted != {not torch.cuda.is_available()}:
    raise RuntimeError("triton was imported before TRITON_INTERPRET was set: tests/conftest.py must set it first")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if DEVICE == "cuda" else [])
DTYPE_IDS = [f"{x}-deltas-{deltas}".replace("torch.", "") for x, deltas in DTYPES]
# M, D, N, K, S: odd everywhere; one row; a full tile of each kind; more weightings than rows; several N and D blocks.
SHAPES = [(1, 33, 7, 2, 1), (3, 33, 7, 1, 5), (17, 70, 70, 5, 4), (140, 40, 33, 2, 4)]


@dataclass(frozen=True)
class Problem:
    """One call's inputs, and dy. M rows, D in, N out, K copies, S distinct weightings."""

    x_MD: Tensor
    base_ND: Tensor | None
    deltas_NKD: Tensor
    c_SK: Tensor
    row_map_M: Tensor
    bias_N: Tensor | None
    bias_deltas_NK: Tensor | None
    dy_MN: Tensor

    def run(self) -> dict[str, Tensor]:
        rest = (self.base_ND, self.deltas_NKD, self.c_SK, self.row_map_M)
        d_deltas, d_c = launchers.backward_deltas(
            self.dy_MN, self.x_MD, self.deltas_NKD, self.c_SK, self.row_map_M, True, True
        )
        assert d_deltas is not None
        assert d_c is not None
        y = launchers.forward(self.x_MD, *rest, self.bias_N, self.bias_deltas_NK)
        return {"y": y, "dx": launchers.backward_x(self.dy_MN, *rest), "d_deltas": d_deltas, "d_c": d_c}

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by F.linear per stream and autograd, computed in one dtype throughout."""
        x, deltas, c = (t.detach().to(dtype).requires_grad_() for t in (self.x_MD, self.deltas_NKD, self.c_SK))
        c_MK = c[self.row_map_M.long()]
        y = torch.zeros(len(x), len(deltas), dtype=dtype, device=x.device)
        if self.base_ND is not None:
            y = F.linear(x, self.base_ND.to(dtype))
        if self.bias_N is not None:
            y = y + self.bias_N.to(dtype)
        if self.bias_deltas_NK is not None:
            # Detached: the launchers' d_c leaves the bias deltas' share to the operator.
            y = y + F.linear(c_MK.detach(), self.bias_deltas_NK.to(dtype))
        for k in range(deltas.shape[1]):
            y = y + c_MK[:, k : k + 1] * F.linear(x, deltas[:, k])
        dx, d_deltas, d_c = torch.autograd.grad(y, (x, deltas, c), self.dy_MN.to(dtype))
        return {"y": y.detach(), "dx": dx, "d_deltas": d_deltas, "d_c": d_c}


def make_problem(M: int, D: int, N: int, K: int, S: int, x: torch.dtype, deltas: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(M * 31 + D)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    return Problem(
        x_MD=normal(M, D, dtype=x),
        base_ND=normal(N, D, dtype=F32).div(D**0.5).to(x),
        deltas_NKD=normal(N, K, D, dtype=F32).div(D**0.5).to(deltas),
        c_SK=torch.rand((S, K), generator=generator).to(DEVICE),
        row_map_M=torch.randint(S, (M,), generator=generator, dtype=torch.int32).to(DEVICE),
        bias_N=normal(N, dtype=x),
        bias_deltas_NK=normal(N, K, dtype=deltas),
        dy_MN=normal(M, N, dtype=x),
    )


def assert_within_budget(problem: Problem) -> None:
    actual, exact, by_torch = problem.run(), problem.oracle(torch.float64), problem.oracle(problem.x_MD.dtype)
    rounding = torch.finfo(problem.x_MD.dtype).eps
    walk = torch.finfo(F32).eps * max(*problem.x_MD.shape, *problem.dy_MN.shape) ** 0.5
    for name, value in actual.items():
        error = (value.double() - exact[name]).abs().max().item()
        own = (by_torch[name].double() - exact[name]).abs().max().item()
        size = exact[name].abs()
        budget = 2 * own + rounding * size.max().item() + walk * size.mean().item()
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}, torch's own {own:.3e}"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that an element which no program stores is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("x", "deltas"), DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], x: torch.dtype, deltas: torch.dtype) -> None:
    M, D, N, K, S = shape
    assert_within_budget(make_problem(M, D, N, K, S, x, deltas))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, base_ND=None, bias_N=None, bias_deltas_NK=None),
        lambda p: replace(p, bias_N=None),
        lambda p: replace(p, bias_deltas_NK=None),
        lambda p: replace(p, c_SK=torch.zeros_like(p.c_SK)),
        lambda p: replace(p, c_SK=-2 * p.c_SK),
    ],
    ids=["no base", "no bias", "no bias deltas", "zero coefficients", "off the simplex"],
)
def test_optional_terms(change: Callable[[Problem], Problem]) -> None:
    assert_within_budget(change(make_problem(19, 33, 35, 2, 3, F32, F32)))


def test_strided_inputs_give_the_bits_of_contiguous_ones() -> None:
    p = make_problem(19, 33, 35, 2, 3, F32, F32)
    p = replace(p, dy_MN=p.dy_MN[:, :1].expand(-1, 35), row_map_M=p.row_map_M[:1].expand(19))
    assert p.base_ND is not None
    strided = replace(
        p,
        x_MD=p.x_MD.T.contiguous().T,
        base_ND=p.base_ND.T.contiguous().T,
        deltas_NKD=p.deltas_NKD.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        c_SK=p.c_SK.T.contiguous().T,
    )
    contiguous = replace(p, dy_MN=p.dy_MN.contiguous(), row_map_M=p.row_map_M.contiguous())
    expected = contiguous.run()
    for name, value in strided.run().items():
        assert torch.equal(value, expected[name]), name
    assert_within_budget(strided)


@pytest.mark.parametrize("M", [16, 40])
def test_a_row_does_not_depend_on_its_neighbours(M: int) -> None:
    p = make_problem(M, 100, 65, 2, 3, F32, F32)
    one_weighting = replace(p, row_map_M=torch.full_like(p.row_map_M, p.row_map_M[5].item()))
    other_rows = replace(p, x_MD=torch.randn_like(p.x_MD), dy_MN=torch.randn_like(p.dy_MN))
    other_rows.x_MD[5], other_rows.dy_MN[5] = p.x_MD[5], p.dy_MN[5]
    expected = p.run()
    for changed in (one_weighting, other_rows):
        actual = changed.run()
        assert torch.equal(actual["y"][5], expected["y"][5])
        assert torch.equal(actual["dx"][5], expected["dx"][5])


def test_two_runs_give_the_same_bits() -> None:
    p = make_problem(40, 40, 65, 3, 4, F32, F32)
    first, second = p.run(), p.run()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_rows() -> None:
    result = make_problem(0, 33, 7, 2, 3, F32, F32).run()
    assert result["y"].shape == (0, 7)
    assert result["dx"].shape == (0, 33)
    assert torch.equal(result["d_deltas"], torch.zeros(7, 2, 33, device=DEVICE))
    assert torch.equal(result["d_c"], torch.zeros(3, 2, device=DEVICE))


def test_gradients_that_nobody_asked_for_are_none() -> None:
    p = make_problem(3, 33, 7, 2, 3, F32, F32)
    arguments = (p.dy_MN, p.x_MD, p.deltas_NKD, p.c_SK, p.row_map_M)
    assert launchers.backward_deltas(*arguments, False, False) == (None, None)
    assert launchers.backward_deltas(*arguments, False, True)[0] is None
    assert launchers.backward_deltas(*arguments, True, False)[1] is None


def test_main_grad_takes_the_gradient_of_the_deltas() -> None:
    p = make_problem(19, 33, 35, 2, 3, F32, F32)
    arguments = (p.dy_MN, p.x_MD, p.deltas_NKD, p.c_SK, p.row_map_M)
    start = torch.randn_like(p.deltas_NKD)
    main_grad = start.clone()
    assert launchers.backward_deltas(*arguments, True, False, main_grad=main_grad) == (None, None)
    assert torch.equal(main_grad, start + p.run()["d_deltas"])


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("x", "deltas"), DTYPES[1:], ids=DTYPE_IDS[1:])
def test_small_deltas_keep_their_effect_in_16_bits(x: torch.dtype, deltas: torch.dtype, size: float) -> None:
    """y(c) - y(0) projected on the exact effect is 1. Rounding the mix would leave 0.04 of it at 1e-5 in bfloat16.

    The roundings of y are independent of the effect: at 1e-5 they leave a noise of about 1.3 % in float16 (128 x 64
    results) and 1 % in bfloat16 (1024 x 576), at 1e-5 the float16 deltas themselves add 0.5 % (they are subnormal).
    """
    M, N = (1024, 576) if DEVICE == "cuda" else (128, 64)
    p = make_problem(M, 576, N, 2, 4, x, F32)
    p = replace(p, deltas_NKD=(p.deltas_NKD.sign() * size).to(deltas), bias_N=None, bias_deltas_NK=None)
    zero = replace(p, c_SK=torch.zeros_like(p.c_SK))
    arguments = [(q.x_MD, q.base_ND, q.deltas_NKD, q.c_SK, q.row_map_M, None, None) for q in (p, zero)]
    effect = launchers.forward(*arguments[0]).double() - launchers.forward(*arguments[1]).double()
    exact = p.oracle(torch.float64)["y"] - zero.oracle(torch.float64)["y"]
    assert abs((effect * exact).sum() / (exact * exact).sum() - 1) < 0.06


@pytest.mark.skipif(DEVICE == "cuda", reason="the untouched address space stands in for tensors of over 2^31 elements")
def test_offsets_beyond_32_bits() -> None:
    p = make_problem(3, 16, 3, 1, 1, F32, F32)
    stride = 2**30  # the third row starts at element 2^31
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name before Python 3.13
    space = mmap.mmap(-1, 4 * (2 * stride + 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    elements = torch.frombuffer(space, dtype=F32)
    x_MD = elements.as_strided((3, 16), (stride, 1))
    x_MD.copy_(p.x_MD)
    expected = p.run()
    assert torch.equal(replace(p, x_MD=x_MD).run()["y"], expected["y"])
    deltas_NKD = elements.as_strided((3, 1, 16), (stride, 16, 1))
    deltas_NKD.copy_(p.deltas_NKD)
    actual = replace(p, deltas_NKD=deltas_NKD)
    rest = (actual.deltas_NKD, p.c_SK, p.row_map_M)
    assert torch.equal(launchers.forward(p.x_MD, p.base_ND, *rest, p.bias_N, p.bias_deltas_NK), expected["y"])
    assert torch.equal(launchers.backward_x(p.dy_MN, p.base_ND, *rest), expected["dx"])
    d_c_SK = launchers.backward_deltas(p.dy_MN, p.x_MD, *rest, False, True)[1]
    assert d_c_SK is not None
    assert torch.equal(d_c_SK, expected["d_c"])


def test_float64_is_refused_by_name() -> None:
    p = make_problem(3, 16, 3, 1, 1, torch.float64, torch.float64)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        p.run()


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is exact on a GPU")
def test_the_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match="raw bits"):
        make_problem(3, 16, 3, 1, 1, BF16, F32).run()


def test_the_public_operator_reaches_the_launchers() -> None:
    p = make_problem(17, 33, 35, 2, 3, F32, F32)
    gradients = {}
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (p.x_MD, p.deltas_NKD, p.c_SK)]
        x, deltas, c = leaves
        y = clp_kernels.mixed_linear(x, p.base_ND, deltas, c, p.bias_N, row_map=p.row_map_M, backend=name)
        gradients[name] = [y.detach(), *torch.autograd.grad(y, leaves, p.dy_MN)]
    for actual, expected in zip(gradients["triton"], gradients["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
