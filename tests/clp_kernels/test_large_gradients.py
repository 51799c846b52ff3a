"""Gradients of 8 MiB and more, which the CPU kernels write past the caches: aligned rows, odd ones, every set of
instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_linear_support import BF16, F16, F32, ISAS, needs_cpp
from torch import Tensor

from clp_kernels import extension, mixed_linear, mixed_linear_logprob

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]
K, LEAST = 2, 8 << 20


def gradients(operator: str, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The deltas' gradient, and the same added to a float32 buffer of zeros."""
    generator = torch.Generator().manual_seed(D)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    N = LEAST // (D * dtype.itemsize * (K if operator == "linear" else 1)) + 5
    x, base, c = randn(70, D), randn(N, D) * D**-0.5, randn(1, K)
    deltas = (randn(N, K, D) * D**-0.5).to(dtype)
    x, base = (t if dtype == F32 else t.to(dtype) for t in (x, base))
    rows: dict[str, Any] = {"row_map": torch.zeros(70, dtype=torch.int32), "backend": "cpp"}
    targets, dy = torch.randint(N, (70,), generator=generator), randn(70, N)
    found = []
    for main_grad in (None, torch.zeros(N, K, D)):
        leaf = deltas.clone().requires_grad_()
        if main_grad is not None:
            leaf.main_grad = main_grad
        if operator == "linear":
            mixed_linear(x, base, leaf, c, **rows).backward(dy.to(dtype))
        else:
            mixed_linear_logprob(x, base, leaf, c, targets, **rows)[0].sum().backward()
        found.append(leaf.grad if main_grad is None else main_grad)
    assert found[0].numel() * found[0].element_size() >= LEAST
    return found[0], found[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("D", [512, 1001])
@pytest.mark.parametrize("operator", ["linear", "head"])
def test_large_gradients_have_the_bits_of_a_buffer(operator, D, dtype, isa):
    extension.set_isa(isa)
    try:
        returned, added = gradients(operator, D, dtype)
    finally:
        extension.set_isa("best")
    assert returned.abs().max() > 0
    assert torch.equal(returned, added.to(dtype))
