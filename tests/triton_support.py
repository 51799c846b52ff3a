"""What the tests of the Triton launchers share: where they run, the error budget, memory beyond 2^31 elements."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at its first import

import triton

from clp_kernels.launch_triton import INTERPRETED

# Triton decorates its own functions (tl.sum) at its first import, which `import clp_kernels` causes through torch.
# A variable set after that leaves half of Triton compiled, and every test would fail for the wrong reason.
if {INTERPRETED, not isinstance(triton.language.sum, triton.JITFunction)} != {not torch.cuda.is_available()}:
    raise RuntimeError("triton was imported before TRITON_INTERPRET was set: tests/conftest.py must set it first")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Of rows and deltas.
DTYPES = [(F32, F32), (F32, F16), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if DEVICE == "cuda" else [])
on_cpu_alone = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's, or in place of memory that a GPU lacks")
Arguments = dict[str, Any]


def on_device(arguments: Mapping[str, Any]) -> Arguments:
    return {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in arguments.items()}


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def differentiate(
    op: Callable[..., Tensor], a: Arguments, dtype: torch.dtype | None = None, **settings: Any
) -> Arguments:
    """y, and the gradient of each floating argument by name for a random dy; in `dtype` where it is given."""
    inputs = {n: t.detach().to(dtype or t.dtype).clone().requires_grad_() if is_float(t) else t for n, t in a.items()}
    y = op(**inputs, **settings)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()  # the same values in every dtype
    y.backward(dy.to(y.device, y.dtype))
    return {"y": y.detach(), **{n: t.grad for n, t in inputs.items() if is_float(t)}}


def assert_within_budget(ours: Arguments, torchs: Arguments, exact: Arguments, terms: int, cut: float = 0.0) -> None:
    """Twice torch's own error, one roundoff of the largest value, and a float32 sum's walk of sqrt(terms).

    Args:
        ours, torchs, exact: name -> value; torch's in the same dtype, the exact ones in float64.
        terms: the length of the longest sum.
        cut: of the largest value, what TF32 may cut off a float32 operand beside 16-bit rows.
    """
    assert ours.keys() == exact.keys()
    walk = torch.finfo(F32).eps * terms**0.5
    for name, expected in exact.items():
        value, size = ours[name], expected.abs()
        assert value.dtype == torchs[name].dtype, name
        assert value.shape == expected.shape, name
        assert value.numel(), name
        error, own = ((v.double() - expected).abs().max().item() for v in (value, torchs[name]))
        roundoff = max(torch.finfo(value.dtype).eps / 2, cut)
        mean = size[size > 0].mean().nan_to_num().item()  # a weighting without rows has zeros
        budget = 2 * own + roundoff * size.max().item() + walk * mean
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}, torch's own {own:.3e}"


def assert_same_bits(actual: Arguments, expected: Arguments) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every torch.empty with NaN, so that an element which no program stores is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def untouched_memory(num_elements: int) -> Tensor:
    """float32 zeros of any number: address space, of which what is touched alone takes memory."""
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name before Python 3.13
    space = mmap.mmap(-1, 4 * num_elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(space, dtype=F32)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values with 2^30 elements from one index of dim 0 to the next: the third starts at element 2^31."""
    stride = 2**30
    inner = tensor[0].numel()
    rest = tensor[0].contiguous().stride()
    space = untouched_memory((len(tensor) - 1) * stride + inner)
    return space.as_strided(tensor.shape, (stride, *rest)).copy_(tensor)
