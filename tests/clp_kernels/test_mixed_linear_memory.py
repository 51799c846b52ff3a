"""What mixed_linear keeps and allocates: bytes saved for backward, no copy of the deltas, gradients added in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_linear_support import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    largest_allocation,
    problem,
    sizes_of,
    values_and_gradients,
)
from torch import Tensor

from clp_kernels import mixed_linear, mixed_linear_ref

M, D, N, K = 256, 192, 160, 3


def saved_bytes(call: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """The bytes of the distinct storages that `call` saves for backward, those of `weights` apart."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", ["one", "different"])
def test_saves_no_more_than_a_plain_layer(backend, dtype, autocast, rows):
    """c (x) x, a mix, or one output per copy would each be 100 KiB and more."""
    a = problem(M, D, N, K, dtype, F32, rows)
    for name in ("x", "deltas", "coefficients"):
        a[name].requires_grad_()
    weight = a["base"].clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        plain = saved_bytes(lambda: F.linear(a["x"], weight), [weight])
        ours = saved_bytes(lambda: mixed_linear(**a, backend=backend), [a["base"], a["deltas"], a["bias_deltas"]])
    assert a["x"].numel() * a["x"].element_size() // (2 if autocast else 1) <= plain
    assert ours <= plain + 64 * 1024


def large(dtype: torch.dtype) -> dict[str, Any]:
    """Few rows beside float32 deltas of 24 MiB, half of which is more than bounded scratch memory."""
    a = problem(4, 1024, 1536, 4, dtype, F32, "different")
    a["deltas"].requires_grad_()
    return a


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "autocast"), [(F32, True), (BF16, False), (F32, False), (F16, False)])
def test_no_copy_of_the_deltas(backend, dtype, autocast):
    """float32 deltas beside 16-bit rows: neither the forward nor the backward of x makes N * K * D elements."""
    a = large(dtype)
    a["deltas"].requires_grad_(False)
    a["x"].requires_grad_()
    sixteen_bits = a["deltas"].numel() * 2
    assert largest_allocation(lambda: a["deltas"].to(BF16)) >= sixteen_bits  # the measure sees such a copy

    def forward_and_backward() -> None:
        with torch.autocast("cpu", BF16, enabled=autocast):
            y = mixed_linear(**a, backend="auto" if dtype == F16 and backend == "cpp" else backend)
        assert y.dtype == (BF16 if autocast else dtype)
        y.backward(torch.ones_like(y))

    assert largest_allocation(forward_and_backward) < sixteen_bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deltas_dtype", [F32, BF16])
@pytest.mark.parametrize("rows", ["one", "segments", "different"])
def test_main_grad_takes_the_gradient_of_the_deltas(backend, deltas_dtype, rows):
    """Added in float32 call by call, never rounded to the deltas' dtype; the other gradients come as ever."""
    a = problem(40, 33, 18, 2, BF16, deltas_dtype, rows)
    dy = torch.randn(40, 18, generator=torch.Generator().manual_seed(1)).to(BF16)
    start = torch.randn(a["deltas"].shape, generator=torch.Generator().manual_seed(2))
    a["deltas"].requires_grad_().main_grad = start.clone()
    a["coefficients"].requires_grad_()
    for _ in range(2):
        mixed_linear(**a, backend=backend).backward(dy)
    assert a["deltas"].grad is None
    assert a["coefficients"].grad is not None
    b = {name: a[name].detach() for name in a}
    exact = values_and_gradients(mixed_linear_ref, b, F64, dy)["deltas"]
    sizes = values_and_gradients(mixed_linear_ref, sizes_of(b), F64, dy.abs())["deltas"]
    added = a["deltas"].main_grad.double() - start
    # A float32 sum's roundings of its terms' sizes, and those of the two additions to what was there.
    allowed = 16 * 2**-24 * (2 * sizes + start.abs())
    assert ((added - 2 * exact).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_needs_no_second_tensor_of_its_size(backend):
    a = large(F32)
    whole = a["deltas"].numel() * 4
    y = mixed_linear(**a, backend=backend)
    assert largest_allocation(lambda: y.backward(torch.ones_like(y))) >= whole
    a["deltas"].main_grad = torch.zeros_like(a["deltas"], requires_grad=False)
    y = mixed_linear(**a, backend=backend)
    assert largest_allocation(lambda: y.backward(torch.ones_like(y))) < whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("main_grad", "says"),
    [
        (torch.zeros(6, 2, 7), r"main_grad is \[6, 2, 7\].*like deltas \[6, 2, 8\]"),
        (torch.zeros(8, 2, 6).permute(2, 1, 0), "must be contiguous"),
        (torch.zeros(6, 2, 8, dtype=BF16), r"main_grad is torch\.bfloat16.*must be torch\.float32"),
    ],
)
def test_a_main_grad_that_does_not_fit_is_named(backend, main_grad, says):
    a = problem(4, 8, 6, 2, BF16, F32)
    a["deltas"].requires_grad_().main_grad = main_grad
    with pytest.raises(ValueError, match=says):
        mixed_linear(**a, backend=backend)
