"""`deltas.main_grad` of the embedding and the head: gradients added in float32, with no tensor of the deltas' size.

mixed_linear's own is in test_mixed_linear_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixed_linear_support import BACKENDS, BF16, F32, largest_allocation
from torch import Tensor

from clp_kernels import mixed_embedding, mixed_linear_logprob

K, D = 2, 20
ROWS = {
    "segments": torch.arange(40, dtype=torch.int32) // 10,
    "different": torch.arange(40, dtype=torch.int32),
}
OPERATORS = ["embedding", "head-segments", "head-different"]


def arguments(operator: str, V: int, deltas_dtype: torch.dtype, dtype: torch.dtype = F32) -> dict[str, Any]:
    """An operator's arguments: deltas and coefficients want gradients; token 3 occurs often, token 4 never."""
    generator = torch.Generator().manual_seed(V)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    name, _, rows = operator.partition("-")
    row_map = ROWS[rows or "segments"]
    tokens = torch.randint(5, V, (40,), generator=generator)
    tokens[::3] = 3
    of_head = {"hidden": randn(40, D).to(dtype), "targets": tokens}
    return {
        **(of_head if name == "head" else {"ids": tokens}),
        "base": randn(V, D).to(dtype),
        "deltas": (0.1 * randn(V, K, D)).to(deltas_dtype).requires_grad_(),
        "coefficients": randn(int(row_map.max()) + 1, K).requires_grad_(),
        "row_map": row_map,
    }


def call(operator: str, a: dict[str, Any], backend: str) -> Tensor:
    if operator == "embedding":
        return mixed_embedding(**a, backend=backend).float().sin().sum()
    logprob, entropy = mixed_linear_logprob(**a, backend=backend)
    return logprob.sum() + entropy.square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, BF16)])
def test_it_takes_the_gradient_and_leaves_the_others(operator, backend, dtypes):
    deltas_dtype, dtype = dtypes
    a = arguments(operator, 300, deltas_dtype, dtype)
    plain = {**a, "deltas": a["deltas"].detach().float().requires_grad_()}  # float32: nothing is rounded away
    plain["coefficients"] = a["coefficients"].detach().clone().requires_grad_()
    call(operator, plain, backend).backward()
    start = torch.randn(a["deltas"].shape)
    a["deltas"].main_grad = start.clone()
    for _ in range(2):
        call(operator, a, backend).backward()
    assert a["deltas"].grad is None
    added, expected = a["deltas"].main_grad - start, 2 * plain["deltas"].grad
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(a["coefficients"].grad, 2 * plain["coefficients"].grad, rtol=1e-5, atol=1e-4)
    if operator == "embedding":
        assert torch.equal(a["deltas"].main_grad[4], start[4])
        assert (added[3] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_adds_nothing(backend):
    a = arguments("embedding", 30, F32)
    a["deltas"].main_grad = torch.zeros(30, K, D)
    mixed_embedding(**a, padding_idx=3, backend=backend).sum().backward()
    assert torch.equal(a["deltas"].main_grad[3], torch.zeros(K, D))
    assert (a["deltas"].main_grad != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_rows_leave_it_alone(operator, backend):
    a = arguments(operator, 30, F32)
    a |= {name: a[name][:0] for name in ("hidden", "targets", "ids", "row_map") if name in a}
    a["deltas"].main_grad = torch.full((30, K, D), 7.0)
    call(operator, a, backend).backward()
    assert torch.equal(a["deltas"].main_grad, torch.full((30, K, D), 7.0))
    assert a["deltas"].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_it_needs_no_tensor_of_its_size(operator, backend):
    V = 60_000

    def most(backward: Callable[[], None]) -> int:
        return largest_allocation(backward)

    a = arguments(operator, V, F32)
    whole = a["deltas"].numel() * 4
    a["coefficients"].requires_grad_(False)
    loss = call(operator, a, backend)
    assert most(lambda: loss.backward(retain_graph=True)) >= whole
    a["deltas"].main_grad = torch.zeros(V, K, D)
    with_buffer = call(operator, a, backend)
    assert most(lambda: with_buffer.backward()) < whole / 2


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_that_does_not_fit_is_named(operator):
    a = arguments(operator, 30, F32)
    for bad, says in (
        (torch.zeros(30, K, D - 1), r"main_grad is \[30, 2, 19\].*like deltas \[30, 2, 20\]"),
        (torch.zeros(30, K, D, dtype=BF16), r"main_grad is torch\.bfloat16.*must be torch\.float32"),
    ):
        a["deltas"].main_grad = bad
        with pytest.raises(ValueError, match=says):
            call(operator, a, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_graphs_add_to_it(operator, backend):
    a = arguments(operator, 30, F32)
    a["deltas"].main_grad = torch.zeros(30, K, D)
    call(operator, a, backend).backward()
    expected = a["deltas"].main_grad.clone()
    torch.compile(lambda: call(operator, a, backend), fullgraph=True)().backward()
    torch.testing.assert_close(a["deltas"].main_grad, 2 * expected, rtol=1e-5, atol=1e-5)
    assert a["deltas"].grad is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives_raise(operator):
    a = arguments(operator, 30, F32)
    a["deltas"].main_grad = torch.zeros(30, K, D)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(call(operator, a, "auto"), a["coefficients"], create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    a = {name: t.detach() for name, t in arguments("embedding", 30, F32).items()}
    c, row_map, main_grad = a["coefficients"], a["row_map"], torch.zeros(30, K, D)
    inputs = (torch.randn(40, D), a["ids"], a["deltas"], c, row_map, 2)
    torch.library.opcheck(torch.ops.clp.mixed_embedding_backward_.default, (*inputs, True, main_grad, True, backend))
    a = {name: t.detach() for name, t in arguments("head-segments", 30, F32).items()}
    head = (a["hidden"], a["base"], a["deltas"], c, row_map, None, None, a["targets"], -100, 1.0, 1.0, None)
    _, entropy, normalizer, _ = torch.ops.clp.mixed_linear_logprob_fwd(*head, True, True, False, backend)
    outputs = (normalizer, entropy, torch.randn(40), torch.randn(40))
    needs = [True, True, False, True, False, False]
    torch.library.opcheck(
        torch.ops.clp.mixed_linear_logprob_backward_.default, (*head, *outputs, needs, backend, main_grad)
    )
