"""batch_invariant of the operators beside mixed_linear: a row's y and its gradient keep their bits in any batch."""

from __future__ import annotations

import functools

import pytest
import torch
from mixed_linear_support import BF16, F32, needs_cpp
from torch import Tensor

from clp_kernels import low_rank_linear, mixed_embedding, mixed_norm

M, D, N, R, K, V = 80, 300, 47, 7, 2, 19


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def low_rank(dtype: torch.dtype, base: bool = True):
    weights = (randn(N, D, dtype=dtype) if base else None, randn(R, D), randn(N, R))
    return functools.partial(_low_rank, weights, randn(N, dtype=dtype)), randn(M, D, dtype=dtype), R


def _low_rank(weights, bias, x, gates, **options):
    return low_rank_linear(x, *weights, gates, bias, **options)


def norm(dtype: torch.dtype, kind: str):
    weight, deltas, bias = randn(D, dtype=dtype), randn(D, K), randn(D, dtype=dtype)
    options = {"bias_deltas": randn(D, K, seed=1), "kind": kind}
    return lambda x, c, **rest: mixed_norm(x, weight, deltas, c, bias, **options, **rest), randn(M, D, dtype=dtype), K


def embedding(dtype: torch.dtype):
    base, deltas = randn(V, D, dtype=dtype), randn(V, K, D)
    ids = torch.randint(V, (M,), generator=torch.Generator().manual_seed(3))
    return lambda x, c, **rest: mixed_embedding(x, base, deltas, c, **rest), ids, K


OPERATORS = {
    "low_rank": low_rank,
    "low_rank_alone": functools.partial(low_rank, base=False),
    "rms": functools.partial(norm, kind="rms"),
    "layer": functools.partial(norm, kind="layer"),
    "embedding": embedding,
}


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_row_keeps_its_bits(isa, name, dtype):
    """Alone, among others, in another order and on two threads, with gradients and without."""
    call, x, width = OPERATORS[name](dtype)
    c_SK, row_map = randn(3, width), torch.randint(3, (M,), dtype=torch.int32)
    dy = randn(M, call(x[:1], c_SK[0]).shape[1], dtype=dtype, seed=5)

    def run(taken: Tensor) -> list[Tensor]:
        x_taken, options = x[taken], {"row_map": row_map[taken], "backend": "cpp", "batch_invariant": True}
        without = call(x_taken, c_SK, **options)
        if not x.is_floating_point():
            return [without]
        y = call(x_taken.requires_grad_(), c_SK, **options)
        assert torch.equal(y, without)
        return [y.detach(), *torch.autograd.grad(y, x_taken, dy[taken])]

    whole, threads = run(torch.arange(M)), torch.get_num_threads()
    try:
        for count, rows in ((1, [0]), (1, [79, 3]), (2, list(range(M))), (2, list(range(70, 2, -1)))):
            torch.set_num_threads(count)
            for part, all_rows in zip(run(torch.tensor(rows)), whole, strict=True):
                assert torch.equal(part, all_rows[rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@needs_cpp
def test_low_rank_values_and_gradients_are_those_of_a_call_without(isa):
    """Every gradient, to the rounding of another order of the sums."""
    call, x, width = low_rank(F32)
    weights, bias = call.args
    leaves = [t.clone().requires_grad_() for t in (x, *weights, randn(3, width), bias)]
    row_map = torch.arange(M, dtype=torch.int32) % 3
    results = []
    for batch_invariant in (False, True):
        y = low_rank_linear(*leaves, row_map=row_map, backend="cpp", batch_invariant=batch_invariant)
        results.append([y, *torch.autograd.grad(y, leaves, randn(M, N, seed=5))])
    for plain, invariant in zip(*results, strict=True):
        torch.testing.assert_close(invariant, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0][0], results[1][0]), "torch's GEMM kept the bits: the test shows nothing"


@needs_cpp
def test_an_empty_batch_and_a_compiled_graph():
    call, x, width = low_rank(F32)
    gates = randn(width)
    assert call(x[:0], gates, batch_invariant=True).shape == (0, N)

    def run(x: Tensor) -> Tensor:
        return call(x, gates, batch_invariant=True)

    assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_refuses(name):
    call, x, width = OPERATORS[name](F32)
    with pytest.raises(ValueError, match=r"'reference' does not take this call: batch_invariant.*call without it"):
        call(x, randn(width), backend="reference", batch_invariant=True)
