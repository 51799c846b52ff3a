"""What back-end "cpp" promises beside values: batch invariance, gradients added in float32, bounded scratch memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixed_linear_support import BF16, F16, F32, needs_cpp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from clp_kernels import mixed_linear_ref
from clp_kernels.mixed_linear_cpp import backward_deltas, backward_x, forward

pytestmark = needs_cpp
SCRATCH_BYTES = 4 * 2**20


@pytest.fixture
def set_threads():
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


def segments(M: int, S: int, shuffled: bool = False) -> Tensor:
    row_map = (torch.arange(M) * S // M).to(torch.int32)
    return row_map[torch.randperm(M, generator=torch.Generator().manual_seed(1))] if shuffled else row_map


def problem(M: int, D: int, N: int, K: int, S: int, dtype: torch.dtype, deltas_dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(M + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": randn(M, D).to(dtype),
        "dy": randn(M, N).to(dtype),
        "base": randn(N, D).to(dtype),
        "deltas": randn(N, K, D).mul(0.1).to(deltas_dtype),
        "c": randn(S, K),
        "bias": randn(N).to(dtype),
        "bias_deltas": randn(N, K).to(deltas_dtype),
    }


def y_and_dx(a: dict[str, Tensor], rows: Tensor, row_map: Tensor) -> tuple[Tensor, Tensor]:
    weights = (a["base"], a["deltas"], a["c"], row_map[rows])
    y = forward(a["x"][rows], *weights, a["bias"], a["bias_deltas"], batch_invariant=True)
    return y, backward_x(a["dy"][rows], *weights, batch_invariant=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("D", "N"), [(1100, 70), (70, 1100)])  # several blocks of a sum, in y and in dx
@pytest.mark.parametrize("shuffled", [False, True])
def test_batch_invariant(isa, dtype, D, N, shuffled):
    M = 300
    a = problem(M, D, N, 2, 5, dtype, F32)
    row_map = segments(M, 5, shuffled)
    whole = y_and_dx(a, torch.arange(M), row_map)
    wide = {name: tensor.double() for name, tensor in a.items()}
    arguments = (wide["base"], wide["deltas"], wide["c"], wide["bias"])
    x = wide["x"].requires_grad_()
    y = mixed_linear_ref(x, *arguments, bias_deltas=wide["bias_deltas"], row_map=row_map)
    (dx,) = torch.autograd.grad(y, x, wide["dy"])
    for ours, exact in zip(whole, (y, dx), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-4)
    for some in ([0], [299], [7, 8], list(range(40, 60)), list(range(299, 100, -1))):
        taken = torch.tensor(some)
        for all_rows, part in zip(whole, y_and_dx(a, taken, row_map), strict=True):
            assert torch.equal(part, all_rows[taken])


@pytest.mark.parametrize(("M", "S"), [(1, 1), (16, 16), (90, 90), (300, 4)])
def test_batch_invariant_bits_do_not_depend_on_the_number_of_threads(isa, set_threads, M, S):
    a = problem(M, 128, 600, 2, S, F32, F32)
    row_map = segments(M, S)
    results = []
    for count in (1, 2):
        set_threads(count)
        d = backward_deltas(a["dy"], a["x"], a["deltas"], a["c"], row_map, True, True, batch_invariant=True)
        results.append((*y_and_dx(a, torch.arange(M), row_map), *d))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("M", "S"), [(1, 1), (8, 8), (16, 16), (90, 90)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_streaming_bits_do_not_depend_on_the_number_of_threads(isa, set_threads, dtype, M, S):
    a = problem(M, 128, 600, 2, S, dtype, dtype)
    results = []
    for count in (1, 2):
        set_threads(count)
        results.append(forward(a["x"], a["base"], a["deltas"], a["c"], segments(M, S), a["bias"], a["bias_deltas"]))
    assert torch.equal(*results)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("M", "S"), [(5, 5), (40, 40), (200, 3), (700, 1)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_gradients_are_added_to_the_buffer_in_float32(isa, dtype, M, S, batch_invariant):
    a = problem(M, 70, 37, 3, S, dtype, dtype)
    arguments = (a["dy"], a["x"], a["deltas"], a["c"], segments(M, S))
    _, alone = backward_deltas(*arguments, True, True, batch_invariant=batch_invariant)
    before = torch.randn(37, 3, 70, generator=torch.Generator().manual_seed(2))
    main_grad = before.clone()
    none, d_c = backward_deltas(*arguments, True, True, main_grad=main_grad, batch_invariant=batch_invariant)
    assert none is None
    assert torch.equal(d_c, alone)
    c_MK = a["c"].double()[arguments[-1].long()]
    exact = torch.einsum("mn,mk,md->nkd", a["dy"].double(), c_MK, a["x"].double())
    torch.testing.assert_close((main_grad - before).double(), exact, rtol=1e-5, atol=2e-6 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("M", "S"), [(400, 20), (2600, 20)])  # more than 8 weightings, and more than 2048 rows
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_many_short_segments(isa, dtype, M, S, shuffled, batch_invariant):
    check_against_torch(problem(M, 70, 37, 3, S, dtype, dtype), segments(M, S, shuffled), batch_invariant)


# More columns and terms than a block of the mix has, and gradients of 2.2 MB and more, for one thread and for two.
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("dtype", "deltas_dtype"), [(F32, F32), (F16, F32), (BF16, BF16)])
@pytest.mark.parametrize(("M", "S", "shuffled"), [(410, 1, False), (830, 2, True)])
@pytest.mark.parametrize(("N", "D"), [(1100, 1030), (270, 3700)])
def test_several_blocks_of_the_mix(set_threads, num_threads, dtype, deltas_dtype, M, S, shuffled, N, D):
    set_threads(num_threads)
    check_against_torch(problem(M, D, N, 2, S, dtype, deltas_dtype), segments(M, S, shuffled), False)


# The own product: more rows, inputs and outputs (1024 each) than its blocks have, more weightings than are mixed at
# once (8), more copies than wait in registers (4); a last group of rows and panels that are not whole.
@pytest.mark.parametrize(("dtype", "deltas_dtype"), [(F32, F32), (BF16, F32)])
@pytest.mark.parametrize(("K", "batch_invariant"), [(2, False), (5, False), (2, True)])
@pytest.mark.parametrize(("M", "N", "D", "S"), [(1250, 1100, 45, 9), (1250, 45, 1100, 9), (1200, 270, 530, 1)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_several_blocks_of_the_own_product(isa, dtype, deltas_dtype, K, batch_invariant, M, N, D, S, shuffled):
    check_against_torch(problem(M, D, N, K, S, dtype, deltas_dtype), segments(M, S, shuffled), batch_invariant)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_segments_that_list_different_copies(isa, shuffled, batch_invariant):
    a = problem(480, 70, 77, 3, 6, F32, F32)
    a["c"][torch.arange(6), torch.arange(6) % 3] = 0.0  # each weighting leaves one copy out
    row_map = segments(480, 6, shuffled)
    check_against_torch(a, row_map, batch_invariant)
    wanted = y_and_dx_of(a, row_map, batch_invariant)
    a["deltas"][:, 1] = torch.nan
    without = a["c"][row_map.long(), 1] == 0.0
    for clean, poisoned in zip(wanted, y_and_dx_of(a, row_map, batch_invariant), strict=True):
        assert torch.equal(clean[without], poisoned[without])
        assert poisoned[~without].isnan().all()


# One weighting a row: the gradient of coefficients is summed from each stream's outputs, cut among threads.
@pytest.mark.parametrize("N", [45, 1100])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_coefficients_of_rows_that_all_differ(isa, set_threads, N, batch_invariant):
    a = problem(200, 512, N, 2, 200, F32, F32)
    row_map, results = segments(200, 200), []
    for num_threads in (1, 2):
        set_threads(num_threads)
        check_against_torch(a, row_map, batch_invariant)
        gradient_of = (a["dy"], a["x"], a["deltas"], a["c"], row_map, False, True)
        results.append(backward_deltas(*gradient_of, batch_invariant=batch_invariant)[1])
    assert torch.equal(*results) or not batch_invariant


def y_and_dx_of(a: dict[str, Tensor], row_map: Tensor, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    weights, how = (a["base"], a["deltas"], a["c"], row_map), {"batch_invariant": batch_invariant}
    return forward(a["x"], *weights, None, None, **how), backward_x(a["dy"], *weights, **how)


def check_against_torch(a: dict[str, Tensor], row_map: Tensor, batch_invariant: bool) -> None:
    """Compare y and every gradient with torch's, in float64 and, for the budget, in the inputs' dtypes."""
    how = {"batch_invariant": batch_invariant}
    dx = backward_x(a["dy"], a["base"], a["deltas"], a["c"], row_map, **how)
    d_deltas, d_c = backward_deltas(a["dy"], a["x"], a["deltas"], a["c"], row_map, True, True, **how)
    ours = {
        "y": forward(a["x"], a["base"], a["deltas"], a["c"], row_map, None, None, **how),
        "dx": dx,
        "d_deltas": d_deltas,
        "d_c": d_c,
    }

    def by_torch(values: dict[str, Tensor]) -> list[Tensor]:
        values = {name: tensor.detach().clone().requires_grad_() for name, tensor in values.items()}
        y = mixed_linear_ref(values["x"], values["base"], values["deltas"], values["c"], row_map=row_map)
        wanted = [values[name] for name in ("x", "deltas", "c")]
        return [y, *torch.autograd.grad(y, wanted, values["dy"].detach())]

    exacts = by_torch({name: tensor.double() for name, tensor in a.items()})
    for (name, value), torchs, exact in zip(ours.items(), by_torch(a), exacts, strict=True):
        error, own = ((result.double() - exact).abs().max().item() for result in (value, torchs))
        unit = torch.finfo(value.dtype).eps * exact.abs().max().item()
        assert error <= 2 * own + unit, f"{name}: {error:.3g} > 2 * {own:.3g} + {unit:.3g}"


@pytest.mark.parametrize("bad", [torch.zeros(37, 3, 71), torch.zeros(3, 37, 70), torch.zeros(37, 3, 70, dtype=F16)])
def test_a_buffer_that_does_not_fit_raises(bad):
    a = problem(4, 70, 37, 3, 1, F32, F32)
    with pytest.raises(RuntimeError, match=r"main_grad must be float32 \[37, 3, 70\], contiguous"):
        backward_deltas(a["dy"], a["x"], a["deltas"], a["c"], segments(4, 1), True, False, main_grad=bad)


def most_allocated(call: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had handed out at once during `call`, its results among them."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return most


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("M", "S"), [(4, 4), (64, 64), (700, 1), (700, 8)])
@pytest.mark.parametrize(("dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_scratch_memory_is_bounded(set_threads, num_threads, dtype, deltas_dtype, M, S, batch_invariant):
    set_threads(num_threads)
    N, K, D = 2600, 2, 1024
    a = problem(M, D, N, K, S, dtype, deltas_dtype)
    row_map, how = segments(M, S), {"batch_invariant": batch_invariant}
    weights = (a["base"], a["deltas"], a["c"], row_map)
    main_grad = torch.zeros(N, K, D)
    gradient_of = (a["dy"], a["x"], a["deltas"], a["c"], row_map, True, True)
    row_bytes, d_deltas_bytes = M * dtype.itemsize, N * K * D * deltas_dtype.itemsize
    for call, result_bytes in (
        (lambda: forward(a["x"], *weights, None, None, **how), row_bytes * N),
        (lambda: backward_x(a["dy"], *weights, **how), row_bytes * D),
        (lambda: backward_deltas(*gradient_of, **how), d_deltas_bytes),
        (lambda: backward_deltas(*gradient_of, main_grad=main_grad, **how), 0),
    ):
        assert result_bytes <= most_allocated(call) <= result_bytes + num_threads * SCRATCH_BYTES
