"""The ways into mixed_linear: eager calls, batch_invariant, torch.func, arguments of any rank and stride."""

from __future__ import annotations

import importlib

import pytest
import torch
from mixed_linear_support import BACKENDS, BF16, F16, F32, F64, needs_cpp, problem, values_and_gradients
from torch import Tensor

from clp_kernels import mixed_linear, mixed_linear_ref
from clp_kernels.select import CPP_DTYPES


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", ["one", "segments", "shuffled", "different"])
def test_batch_invariant_rows(isa, dtype, rows):
    """A row's y and its gradient keep their bits alone, among others, in another order and on two threads."""
    M = 80
    a = problem(M, 300, 48, 2, dtype, F32, rows)
    dy = torch.randn(M, 48, generator=torch.Generator().manual_seed(9)).to(dtype)

    def run(taken: Tensor) -> dict[str, Tensor]:
        some = {**a, "x": a["x"][taken], "row_map": a["row_map"][taken]}
        return values_and_gradients(mixed_linear, some, None, dy[taken], backend="cpp", batch_invariant=True)

    whole = run(torch.arange(M))
    threads = torch.get_num_threads()
    try:
        for count, some in ((1, [0]), (1, [79, 3]), (2, list(range(M))), (2, list(range(70, 2, -1)))):
            torch.set_num_threads(count)
            part = run(torch.tensor(some))
            assert torch.equal(part["y"], whole["y"][some]), (count, some)
            assert torch.equal(part["x"], whole["x"][some]), (count, some)
    finally:
        torch.set_num_threads(threads)


def test_batch_invariant_is_refused_where_it_cannot_be_kept():
    a = problem(4, 8, 6, 2, F32, F32)
    with pytest.raises(ValueError, match=r"'reference' does not take this call: batch_invariant.*call without it"):
        mixed_linear(**a, backend="reference", batch_invariant=True)
    wide = {n: t if n == "row_map" else t.double() for n, t in a.items()}
    with pytest.raises(ValueError, match="batch_invariant"):  # float64 is the reference's alone
        mixed_linear(**wide, batch_invariant=True)


@needs_cpp
@pytest.mark.parametrize("requires_grad", [False, True])
def test_eager_calls_run_the_compiled_operator_at_once(monkeypatch, requires_grad):
    """No row map, no view, no choice of a back-end in Python: what they would call is not there."""
    # By name: the attribute of the package is the function.
    monkeypatch.setattr(importlib.import_module("clp_kernels.mixed_linear"), "flatten_rows", None)
    a = problem(6, 8, 5, 2, F32, F32)
    a["deltas"].requires_grad_(requires_grad)
    y = mixed_linear(**a)
    assert y.requires_grad == requires_grad
    torch.testing.assert_close(y, mixed_linear_ref(**a), rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("dtype", [F16, F64])
def test_auto_takes_the_reference_for_what_the_compiled_operator_does_not(dtype):
    if dtype in CPP_DTYPES:
        pytest.skip(f"cpp takes {dtype}")
    a = problem(6, 8, 5, 2, dtype, dtype)
    if dtype == F64:
        a["coefficients"] = a["coefficients"].double()
    assert torch.equal(mixed_linear(**a), mixed_linear(**a, backend="reference"))
    with pytest.raises(ValueError, match=rf"'cpp' does not take this call: x is {dtype}"):
        mixed_linear(**a, backend="cpp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4), (0, 3)])
def test_any_rank(backend, leading):
    """x [..., 10] of strides that no view flattens; coefficients by row map and by each prefix of x's sizes."""
    a = problem(1, 10, 6, 2, F32, F32)
    x = torch.randn(*leading, 20, generator=torch.Generator().manual_seed(2))[..., ::2]
    x = x.transpose(0, -2) if len(leading) > 1 else x
    weights = (a["base"], a["deltas"])
    for given in range(x.dim()):
        c = torch.rand(*x.shape[:given], 2)
        y = mixed_linear(x, *weights, c, a["bias"], bias_deltas=a["bias_deltas"], backend=backend)
        c_of_rows = c.reshape(*x.shape[:given], *(1,) * (x.dim() - 1 - given), 2).expand(*x.shape[:-1], 2)
        mix = a["base"] + torch.einsum("...k,nkd->...nd", c_of_rows, a["deltas"])
        expected = (mix @ x[..., None]).squeeze(-1) + a["bias"] + c_of_rows @ a["bias_deltas"].T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    row_map = torch.randint(0, 3, (7, *x.shape[:-1]), dtype=torch.int32).movedim(0, -1)[..., 4]
    c_SK = torch.rand(3, 2)
    y = mixed_linear(x, *weights, c_SK, row_map=row_map, backend=backend)
    expected = mixed_linear(x, *weights, c_SK[row_map.long()], backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_torch_func_raise(backend):
    a = problem(6, 8, 5, 2, F32, F32)
    x = a.pop("x")
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: mixed_linear(x, **a, backend=backend).sum())(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_graphs_keep_batch_invariant_and_main_grad(backend):
    if backend == "reference":
        pytest.skip("the reference refuses batch_invariant")
    a = problem(6, 8, 5, 2, F32, F32)
    a["deltas"].requires_grad_()
    a["deltas"].main_grad = torch.zeros_like(a["deltas"], requires_grad=False)

    def call() -> Tensor:
        return mixed_linear(**a, backend=backend, batch_invariant=True)

    eager = call()
    eager.sum().backward()
    expected = a["deltas"].main_grad.clone()
    compiled = torch.compile(call, fullgraph=True)()
    assert torch.equal(compiled, eager)
    compiled.sum().backward()
    torch.testing.assert_close(a["deltas"].main_grad, 2 * expected)
    assert a["deltas"].grad is None
