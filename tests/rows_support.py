"""What the tests of the row-by-row operators share: back-ends, instruction sets, row maps and the error budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import clp_kernels
from clp_kernels import extension

HAS_CPP = clp_kernels.available_backends()["cpp"] is None
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
# Tensors on the CPU reach Triton's kernels through its interpreter alone; on a GPU test_*_triton.py has its own.
is_interpreted = clp_kernels.available_backends()["triton"] is None and not torch.cuda.is_available()
BACKENDS_AND_TRITON = [
    *BACKENDS,
    pytest.param("triton", marks=pytest.mark.skipif(not is_interpreted, reason="Triton's interpreter is not on")),
]
ISAS = extension.available_isas() if HAS_CPP else ()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    extension.set_isa(name)
    try:
        yield
    finally:
        extension.set_isa("best")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what torch allocates without initialising it with NaN: a value that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def row_map(M: int, rows: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if rows == "one":
        return torch.zeros(M, dtype=torch.int32)
    if rows == "segments":
        return (torch.arange(M) * 4 // max(M, 1)).to(torch.int32)
    if rows == "shuffled":
        return torch.randint(0, 4, (M,), generator=generator).to(torch.int32)
    return torch.arange(M, dtype=torch.int32)


def differentiate(op, arguments, dtype=None, **settings):
    """y and every floating argument's gradient of `op`, for a dy that depends on the shape alone."""
    inputs = {
        name: t.detach().to(dtype or t.dtype).clone().requires_grad_() if is_float(t) else t
        for name, t in arguments.items()
    }
    y = op(**inputs, **settings)
    y_dtype = next(t for t in arguments.values() if is_float(t)).dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y_dtype)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in inputs.items() if is_float(t)}}


def is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def assert_within_budget(ours, torchs, exact, sizes):
    """e <= 2 x torch's own e + 1 unit roundoff, e = max |value - exact| / size, size the sum of the terms' sizes."""
    for name, expected in exact.items():
        size = sizes[name].clamp_min(torch.finfo(torch.float32).tiny)
        assert ours[name].dtype == torchs[name].dtype, name
        assert expected.numel(), name
        error, own = (((v[name].double() - expected).abs() / size).max() for v in (ours, torchs))
        budget = 2 * own + torch.finfo(ours[name].dtype).eps / 2
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g} (torch's own {own:.3g})"
