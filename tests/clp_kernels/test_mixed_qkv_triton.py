"""The Triton launcher of mixed_qkv against a float64 oracle: interpreted without a GPU, compiled on one."""

from __future__ import annotations

import pytest
import torch
from qkv_support import check, converted, problem
from triton_support import DEVICE, DTYPES, F16, F32, poisoned_memory

from clp_kernels import mixed_qkv
from clp_kernels.mixed_qkv_triton import select_qkv_tile

# B, T, D, H_q, H_k, E, K: one pair; a rest of rows, pairs and reduced elements; several blocks of each.
SHAPES = [(1, 1, 7, 1, 1, 2, 1), (5, 1, 33, 3, 1, 6, 3), (17, 1, 70, 2, 1, 36, 2), (2, 3, 130, 1, 1, 64, 2)]


def moved(a):
    return {name: converted(value, lambda t: t.to(DEVICE)) for name, value in a.items()} | {
        "row_map": a["row_map"].to(DEVICE)
    }


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("dtype", "deltas_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_within_the_budget(shape, dtype, deltas_dtype, has_norms):
    # TF32 cuts a float32 operand beside 16-bit rows.
    cut = 2.0**-10 if DEVICE == "cuda" and dtype != F32 and deltas_dtype == F32 else 0.0
    a = moved(problem(*shape, dtype, deltas_dtype, "shuffled", bias=has_norms, norms=has_norms))
    with poisoned_memory():
        check(a, cut, backend="triton")


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("has_norms", [True, False])
def test_rows_keep_their_bits_in_any_batch(dtype, has_norms):
    a = moved(problem(33, 1, 40, 2, 1, 36, 2, dtype, rows="shuffled", norms=has_norms))
    how = {"backend": "triton", "batch_invariant": True}
    whole = mixed_qkv(**a, **how)
    for rows in (slice(0, 1), slice(7, 23)):
        part = mixed_qkv(**{**a, **{name: a[name][rows] for name in ("x", "cos", "sin", "row_map")}}, **how)
        for ours, expected in zip(part, whole, strict=True):
            assert torch.equal(ours, expected[rows])


def test_a_norm_of_heads_has_all_of_a_head_in_a_program():
    for half in (1, 16, 17, 64):
        for dtype in (F32, F16):
            for is_wide in (True, False):
                assert select_qkv_tile(8, dtype, is_wide, half, True, False).outs >= half
                assert select_qkv_tile(8, dtype, is_wide, half, False, False).outs == 16
