"""low_rank_linear's values and gradients against a float64 oracle, with torch's own error as the budget."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from rows_support import BACKENDS, BACKENDS_AND_TRITON, ISAS, needs_cpp

from clp_kernels import extension, low_rank_linear, low_rank_linear_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CPP = {"backend": "cpp"}
Problem = dict[str, torch.Tensor | None]

# M, D, N, R: one row, odd sizes, streamed rows and more, no rank, no input or output feature; a long sum.
SHAPES = [
    (1, 33, 7, 3),
    (3, 64, 40, 8),
    (16, 129, 50, 64),
    (17, 33, 7, 5),
    (130, 40, 19, 16),
    (5, 24, 10, 0),
    (40, 24, 10, 0),
    (4, 0, 6, 2),
    (40, 0, 6, 2),
    (20, 8, 0, 2),
    (9, 2500, 6, 4),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what torch allocates without initialising it with NaN: a value that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request):
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa("best")


def make_problem(
    M: int, D: int, N: int, R: int, x: torch.dtype = F32, adapters: torch.dtype = F32, with_base: bool = True
) -> Problem:
    generator = torch.Generator().manual_seed(M * 7 + R)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": randn(M, D).to(x),
        "base": randn(N, D).to(x) if with_base else None,
        "down": randn(R, D).to(adapters),
        "up": (0.3 * randn(N, R)).to(adapters),
        "gates": 3 * randn(5, R),  # negative and large ones too: nothing assumes a simplex
        "bias": randn(N).to(x),
        "row_map": torch.randint(0, 4, (M,), generator=generator).to(torch.int32),  # no row has weighting 4
    }


def values_and_gradients(
    op, a: Problem, dtype: torch.dtype | None = None, positive: bool = False, **kwargs: str
) -> dict[str, torch.Tensor]:
    """y, and the gradients for a random dy, or, if `positive`, for its magnitudes; computed in `dtype` if given."""
    inputs = {
        name: t if t is None or name == "row_map" else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in a.items()
    }
    y = op(**inputs, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(a["x"].dtype)
    y.backward((dy.abs() if positive else dy).to(y.dtype))
    gradients = {name: t.grad for name, t in inputs.items() if t is not None and t.requires_grad}
    return {"y": y.detach(), **gradients}


def assert_within_budget(a: Problem, **kwargs: str) -> None:
    """At most twice the reference's own error in the same dtype, and one unit roundoff; of the sum of |terms|."""
    absolute = {name: t if t is None or name == "row_map" else t.abs() for name, t in a.items()}
    magnitudes = values_and_gradients(low_rank_linear_ref, absolute, F64, positive=True)
    exact = values_and_gradients(low_rank_linear_ref, a, F64)
    torchs, ours = values_and_gradients(low_rank_linear_ref, a), values_and_gradients(low_rank_linear, a, **kwargs)
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        assert ours[name].dtype == torchs[name].dtype
        assert ours[name].shape == expected.shape
        if expected.numel() == 0:
            continue
        size = magnitudes[name].clamp_min(1e-30)
        error = ((ours[name].double() - expected).abs() / size).max()
        budget = ((torchs[name].double() - expected).abs() / size).max()
        unit = torch.finfo(ours[name].dtype).eps / 2
        assert error <= 2 * budget + unit, f"{name}: {error:.3g} > 2 * {budget:.3g} + {unit:.3g}"


@needs_cpp
@pytest.mark.parametrize(
    ("x", "adapters"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize(("M", "D", "N", "R"), SHAPES)
def test_cpp(isa, M, D, N, R, x, adapters):
    for with_base in (True, False):
        assert_within_budget(make_problem(M, D, N, R, x, adapters, with_base), **CPP)


@needs_cpp
@pytest.mark.parametrize("M", [6, 70])
def test_cpp_any_mix_of_dtypes(M):
    a = make_problem(M, 33, 18, 6)
    for base, down, up, bias in itertools.product((F32, BF16, F16), (F32, BF16), (F32, F16), (F32, BF16)):
        cast = {"base": base, "down": down, "up": up, "bias": bias}
        for x in (F32, F16):
            b = {name: t.to(cast.get(name, t.dtype)) for name, t in a.items()}
            assert_within_budget({**b, "x": a["x"].to(x)}, **CPP)


@needs_cpp
@pytest.mark.parametrize("seed", range(200))
def test_cpp_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def up_to(size: int) -> int:
        return int(torch.randint(0, size, (), generator=generator))

    x = (F32, BF16, F16)[up_to(3)]
    a = make_problem(up_to(90), up_to(300), up_to(90), up_to(40), x, (x, F32)[up_to(2)], up_to(4) > 0)
    if up_to(2):
        a["bias"] = None
    assert_within_budget(a, **CPP)


@needs_cpp
def test_cpp_in_several_tiles():
    """16-bit rows and weights of more than one tile in each direction: 300 rows of 4100 inputs, 70 outputs."""
    assert_within_budget(make_problem(300, 4100, 70, 6, BF16, F32), **CPP)


@pytest.mark.parametrize(("x", "adapters"), [(F32, F32), (BF16, F32), (F16, F16)])
def test_registered_reference_equals_plain_autograd(x, adapters):
    assert_within_budget(make_problem(17, 33, 7, 3, x, adapters), backend="reference")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_zero_up_gives_the_plain_layers_bits(dtype):
    a = make_problem(17, 64, 40, 4, dtype)
    a["x"][3] = 0  # a row of zeros: sums of +0 and -0
    a["bias"][:5] = -0.0
    y = low_rank_linear(**{**a, "up": torch.zeros(40, 4)}, backend="reference")
    integers = torch.int32 if dtype == F32 else torch.int16
    assert torch.equal(y.view(integers), F.linear(a["x"], a["base"], a["bias"]).view(integers))


def surviving_share(M: int, effect_size: float, backend: str) -> float:
    """The share of the steering effect y(g) - y(0) that a bfloat16 y keeps: <seen, exact> / <exact, exact>."""
    a = make_problem(M, 256, 512, 16, BF16, F32)
    a["base"] = (0.04 * a["base"].float()).bfloat16()
    a["up"] = effect_size * a["up"]
    a["bias"] = None
    zero = {**a, "gates": torch.zeros_like(a["gates"])}
    seen = low_rank_linear(**a, backend=backend).double() - low_rank_linear(**zero, backend=backend).double()
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in a.items()}
    exact = low_rank_linear_ref(**{**wide, "base": None})
    return float((seen * exact).sum() / exact.square().sum())


@needs_cpp
@pytest.mark.parametrize("M", [16, 200])
@pytest.mark.parametrize("effect_size", [1e-5, 1e-4, 1e-3])
def test_steering_effect_survives_a_16_bit_y(isa, M, effect_size):
    """Rounded once, an effect below y's last place still shows on average; the reference loses much of such ones."""
    # The noise of one rounding, against the effect of all M * N outputs.
    assert surviving_share(M, effect_size, "cpp") == pytest.approx(1, abs=0.01 + 4e-6 / effect_size)
    if effect_size == 1e-5:
        assert surviving_share(M, effect_size, "reference") < 0.6


@needs_cpp
def test_every_half_is_read_as_torch_reads_it(isa):
    """Denormals, both infinities and NaNs among them, as whole vectors and as the rest of a row."""
    values = torch.arange(-(2**15), 2**15, 3).to(torch.int16).view(F16)
    base = values[:, None].repeat(1, 17)
    y = low_rank_linear(torch.ones(1, 17), base, torch.zeros(0, 17), torch.zeros(len(values), 0), torch.ones(0))
    assert torch.equal(y[0].nan_to_num(nan=1e9), (17 * values.float()).nan_to_num(nan=1e9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [9, 30])
def test_rows_and_gates_that_are_not_a_rows_own_do_not_reach_it(backend, M):
    a = make_problem(M, 33, 18, 4)
    expected = low_rank_linear(**a, backend=backend)
    a["gates"][4] = torch.nan  # the weighting of no row
    a["x"][2] = torch.nan
    y = low_rank_linear(**a, backend=backend)
    assert y[2].isnan().all()
    others = torch.arange(M) != 2
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("M", [9, 30])
def test_equals_the_adapters_one_after_another(backend, M):
    """K LoRA adapters of different ranks and scales: what PEFT's loop computes for one weighting."""
    a = make_problem(M, 33, 18, 11)
    ranks, scales, weights = (2, 5, 4), (0.5, 2.0, 1.0), torch.tensor([0.2, 1.7, -0.4])
    expected = F.linear(a["x"], a["base"], a["bias"])
    for A, B, scale, weight in zip(a["down"].split(ranks), a["up"].split(ranks, dim=1), scales, weights, strict=True):
        expected = expected + F.linear(F.linear(a["x"], A), B) * scale * weight
    gates = (weights * torch.tensor(scales)).repeat_interleave(torch.tensor(ranks))
    y = low_rank_linear(a["x"], a["base"], a["down"], a["up"], gates, a["bias"], backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_leading_sizes_strides_and_empty_batches(backend):
    a = make_problem(12, 10, 6, 4)
    gates = a["gates"][:3]
    x = torch.randn(10, 4, 3).permute(2, 1, 0).requires_grad_()  # [3, 4, 10]
    base, down, up = (a[name].T.contiguous().T for name in ("base", "down", "up"))
    y = low_rank_linear(x, base, down, up, gates, backend=backend)
    torch.testing.assert_close(y, low_rank_linear_ref(x, a["base"], a["down"], a["up"], gates), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    down = a["down"].clone().requires_grad_()
    empty = low_rank_linear(torch.empty(0, 4, 10), base, down, up, torch.empty(0, 4), backend=backend)
    assert empty.shape == (0, 4, 6)
    empty.sum().backward()
    assert torch.equal(down.grad, torch.zeros_like(down))


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("T", [4, 15])
@pytest.mark.parametrize("form", ["[R]", "[B, R]", "[B, T, R]", "[S, R] and row_map", "[S, R] and an expanded row_map"])
def test_every_form_of_gates(backend, T, form):
    """Against one F.linear per row on that row's own merged weight; the gates' gradient has the gates' shape."""
    a, B, R = make_problem(2 * T, 10, 6, 4), 2, 4
    x, row_map = a["x"].view(B, T, 10), None
    gates = torch.randn({"[R]": (R,), "[B, R]": (B, R), "[B, T, R]": (B, T, R)}.get(form, (5, R))).requires_grad_()
    if form == "[S, R] and row_map":
        row_map = a["row_map"].view(B, T)
    elif form == "[S, R] and an expanded row_map":
        row_map = torch.tensor([[3], [1]], dtype=torch.int32).expand(B, T)
    y = low_rank_linear(x, a["base"], a["down"], a["up"], gates, row_map=row_map, backend=backend)
    if row_map is not None:
        own = gates[row_map.long()]
    else:
        own = gates.view(gates.shape[:-1] + (1,) * (3 - gates.dim()) + (R,)).expand(B, T, R)
    weights = a["base"] + (a["up"] * own[..., None, :]) @ a["down"]  # [B, T, N, D]
    expected = (weights @ x[..., None]).squeeze(-1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (ours,), (theirs,) = (torch.autograd.grad(out, gates, dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_one_row_without_leading_sizes(backend):
    a = make_problem(1, 10, 6, 4)
    y = low_rank_linear(a["x"][0], a["base"], a["down"], a["up"], a["gates"][0], backend=backend)
    torch.testing.assert_close(y, low_rank_linear_ref(a["x"], a["base"], a["down"], a["up"], a["gates"][:1])[0])


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("threads", [1, 2])
def test_streamed_bits_depend_on_the_row_alone(isa, threads, dtype):
    before = torch.get_num_threads()
    a = make_problem(16, 300, 400, 24, dtype)
    whole = low_rank_linear(**a, **CPP)
    try:
        torch.set_num_threads(threads)
        for m in (0, 3, 15):
            one = {**a, "x": a["x"][m : m + 1], "row_map": a["row_map"][m : m + 1]}
            assert torch.equal(low_rank_linear(**one, **CPP)[0], whole[m])
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("requires_grad", [False, True])
def test_eager_calls_run_the_compiled_operator_at_once(monkeypatch, requires_grad):
    """No row map, no view, no choice of a back-end in Python: what they would call is not there."""
    # By name: the attribute of the package is the function.
    monkeypatch.setattr(importlib.import_module("clp_kernels.low_rank_linear"), "flatten_low_rank_rows", None)
    a = make_problem(6, 8, 5, 3)
    a["up"].requires_grad_(requires_grad)
    y = low_rank_linear(**a)
    assert y.requires_grad == requires_grad
    torch.testing.assert_close(y, low_rank_linear_ref(**a), rtol=1e-5, atol=1e-5)


needs_tiles = pytest.mark.skipif("amx_bf16" not in ISAS, reason="this processor multiplies no tiles of bfloat16 (AMX)")


@needs_tiles
@pytest.mark.parametrize("base", [BF16, F32])
@pytest.mark.parametrize("adapters", [BF16, F32])
def test_tiles_of_many_rows(adapters, base):
    """Several passes over the weights; torch's product on top of the expand, or, beside a bias, own tiles."""
    a = make_problem(700, 1100, 70, 6, BF16, adapters)
    a["base"] = a["base"].to(base)
    assert_within_budget(a, **CPP)
    assert_within_budget({**a, "bias": None}, **CPP)


@needs_tiles
def test_steering_effect_survives_torchs_product():
    assert surviving_share(500, 1e-5, "cpp") == pytest.approx(1, abs=0.4)
    assert surviving_share(500, 1e-4, "cpp") == pytest.approx(1, abs=0.04)


@needs_tiles
@pytest.mark.parametrize("adapters", [BF16, F32])
def test_no_value_of_a_tile_reaches_another_row_or_output(adapters):
    """A NaN in a row of x or in its gates stays in its row, one in a weight in its output; an infinity stays one."""
    a = make_problem(37, 50, 41, 6, BF16, adapters)
    a["row_map"] = torch.arange(37, dtype=torch.int32)
    a["gates"] = torch.randn(37, 6, generator=torch.Generator().manual_seed(3))
    y = low_rank_linear(**a, **CPP)
    x, gates, up = a["x"].clone(), a["gates"].clone(), a["up"].clone()
    x[20, 49], gates[5, 2], up[40, 5] = torch.nan, torch.nan, torch.nan
    got = low_rank_linear(**{**a, "x": x, "gates": gates, "up": up}, **CPP)
    reached = torch.zeros_like(got, dtype=torch.bool)
    reached[20], reached[5], reached[:, 40] = True, True, True
    assert got[reached].isnan().all()
    assert torch.equal(got[~reached], y[~reached])
    gates[5, 2] = torch.inf
    assert low_rank_linear(**{**a, "gates": gates}, **CPP)[5].isinf().all()
