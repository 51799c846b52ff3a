"""What the tests of mixed_linear share: random problems, their values and gradients, the largest allocation of a call.

Legend: M rows, D in, N out, K copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import clp_kernels
from clp_kernels import extension

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HAS_CPP = clp_kernels.available_backends()["cpp"] is None
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
ISAS = extension.available_isas() if HAS_CPP else ()


def weightings(M: int, rows: str) -> Tensor:
    """A row map of M rows: all of one weighting, up to four in segments or shuffled, or each row its own."""
    generator = torch.Generator().manual_seed(3)
    if rows == "one":
        return torch.zeros(M, dtype=torch.int32)
    if rows == "segments":
        return (torch.arange(M) * 4 // max(M, 1)).to(torch.int32)
    if rows == "shuffled":
        return torch.randint(0, 4, (M,), generator=generator).to(torch.int32)
    return torch.arange(M, dtype=torch.int32)


def problem(
    M: int,
    D: int,
    N: int,
    K: int,
    x_dtype: torch.dtype,
    deltas_dtype: torch.dtype,
    rows: str = "segments",
    with_base: bool = True,
    scale: float = 0.1,
) -> dict[str, Any]:
    """Random arguments of mixed_linear; `scale` is the deltas' standard deviation, the base's is 1."""
    generator = torch.Generator().manual_seed(M * 7 + K)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    row_map = weightings(M, rows)
    return {
        "x": randn(M, D).to(x_dtype),
        "base": randn(N, D).to(x_dtype) if with_base else None,
        "deltas": (scale * randn(N, K, D)).to(deltas_dtype),
        "coefficients": randn(int(row_map.max()) + 1 if M else 1, K),
        "bias": randn(N).to(x_dtype),
        "bias_deltas": randn(N, K).to(deltas_dtype),
        "row_map": row_map,
    }


def sizes_of(a: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with each value's absolute size: what they give is the sum of the terms' sizes."""
    return {name: t if t is None or name == "row_map" else t.abs() for name, t in a.items()}


def values_and_gradients(
    op: Callable[..., Tensor],
    a: dict[str, Any],
    dtype: torch.dtype | None = None,
    dy: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """y and the gradient of each argument, by name; in `dtype` where it is given. A random dy where none is."""
    inputs = {
        name: t if t is None or name == "row_map" else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in a.items()
    }
    y = op(**inputs, **kwargs)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(a["x"].dtype)
    y.backward(dy.to(y.dtype))
    gradients = {name: t.grad for name, t in inputs.items() if t is not None and t.requires_grad}
    return {"y": y.detach(), **gradients}


def largest_allocation(call: Callable[[], object]) -> int:
    """The bytes of the largest piece of memory that torch's allocator handed out during `call`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def premixed(x, base, deltas, coefficients, row_map, bias=None, bias_deltas=None):
    """What rounds base and deltas as one weight: F.linear of the mix, weighting by weighting."""
    y = x.new_zeros(len(x), len(deltas))
    for s, c in enumerate(coefficients):
        weight = torch.einsum("k,nkd->nd", c.to(deltas.dtype), deltas).float()
        weight = (weight if base is None else weight + base.float()).to(x.dtype)
        y = torch.where((row_map == s)[:, None], x @ weight.T, y)
    if bias is not None:
        y = y + bias + (coefficients[row_map.long()] @ bias_deltas.float().T).to(y.dtype)
    return y
