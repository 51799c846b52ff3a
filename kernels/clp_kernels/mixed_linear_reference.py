"""mixed_linear in plain torch: the definition, the fallback on any device, and in float64 the tests' oracle.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.arguments import flatten_rows


def mixed_linear_ref(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
) -> Tensor:
    """Compute `mixed_linear` by the K-concatenated product, differentiable by plain autograd.

    y = F.linear(x, base, bias) + F.linear(c (x) x, deltas.view(N, K * D)) + c @ bias_deltas.T

    Arguments, shapes and errors are those of `mixed_linear`. The base part is F.linear itself, so zero deltas give the
    plain layer's bits. Accumulates in float32 (float64 for float64 input).
    """
    rows = flatten_rows(x, base, deltas, coefficients, bias, bias_deltas, row_map)
    y_MN = forward(rows.x_MD, base, deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas)
    return y_MN.view(*x.shape[:-1], deltas.shape[0])


def forward(
    x_MD: Tensor,
    base_ND: Tensor | None,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    bias_N: Tensor | None,
    bias_deltas_NK: Tensor | None,
    *,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    """Return y_MN in x's dtype.

    y = F.linear(x, base, bias) + F.linear(c (x) x, deltas.view(N, K * D)) + c @ bias_deltas.T
    """
    refuse_batch_invariant(batch_invariant)
    accumulator = torch.promote_types(x_MD.dtype, torch.float32)
    # The conditioned part is built negated and subtracted: a product over zero deltas is +0, and y - (+0) keeps the
    # sign of a y of -0.0, which y + (+0) would not.
    minus_c_MK = -c_SK.to(accumulator).index_select(0, row_map_M)
    with torch.autocast(x_MD.device.type, enabled=False):
        minus_y_MN = F.linear(_weighted_copies(x_MD, minus_c_MK), _concatenated(deltas_NKD, accumulator))
        if bias_deltas_NK is not None:
            minus_y_MN = minus_y_MN + minus_c_MK @ bias_deltas_NK.to(accumulator).T
        bias_N = None if bias_N is None else bias_N.to(x_MD.dtype)
        if base_ND is not None:
            y_MN = F.linear(x_MD, base_ND.to(x_MD.dtype), bias_N).to(accumulator) - minus_y_MN
        else:
            y_MN = -minus_y_MN if bias_N is None else bias_N.to(accumulator) - minus_y_MN
    return y_MN.to(x_MD.dtype)


def backward_x(
    dy_MN: Tensor,
    base_ND: Tensor | None,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    *,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    """Return dx_MD in dy's dtype: `dy @ base + sum_k c_k * (dy @ deltas[:, k])`."""
    refuse_batch_invariant(batch_invariant)
    accumulator = torch.promote_types(dy_MN.dtype, torch.float32)
    minus_c_MK = -c_SK.to(accumulator).index_select(0, row_map_M)
    with torch.autocast(dy_MN.device.type, enabled=False):
        z_MKD = _product_with_copies(dy_MN, deltas_NKD, accumulator)
        minus_dx_MD = torch.bmm(minus_c_MK[:, None, :], z_MKD).squeeze(1)
        if base_ND is None:
            return (-minus_dx_MD).to(dy_MN.dtype)
        dx_MD = dy_MN @ base_ND.to(dy_MN.dtype)
    return (dx_MD.to(accumulator) - minus_dx_MD).to(dy_MN.dtype)


def backward_deltas(
    dy_MN: Tensor,
    x_MD: Tensor,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    *,
    main_grad: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the deltas [N, K, D] (in their dtype) and of the coefficients [S, K]; None if not needed.

    d_deltas = (dy.T @ (c (x) x)).view(N, K, D), added to `main_grad` instead of returned where that is given
    d_c[s, k] = sum of <dy_m, x_m @ deltas[:, k].T> over the rows m of weighting s
    """
    refuse_batch_invariant(batch_invariant)
    accumulator = torch.promote_types(dy_MN.dtype, torch.float32)
    d_deltas_NKD = d_c_SK = None
    with torch.autocast(dy_MN.device.type, enabled=False):
        if needs_deltas:
            cx = _weighted_copies(x_MD, c_SK.to(accumulator).index_select(0, row_map_M))
            if main_grad is None:
                d_deltas_NKD = (dy_MN.to(accumulator).T @ cx).view(deltas_NKD.shape).to(deltas_NKD.dtype)
            else:
                main_grad.flatten(1).addmm_(dy_MN.to(accumulator).T, cx)
        if needs_coefficients:
            z_MKD = _product_with_copies(dy_MN, deltas_NKD, accumulator)
            d_c_MK = torch.bmm(z_MKD, x_MD.to(accumulator)[:, :, None]).squeeze(2)
            d_c_SK = sum_by_weighting(d_c_MK, row_map_M, c_SK.shape[0]).to(c_SK.dtype)
    return d_deltas_NKD, d_c_SK


def refuse_batch_invariant(batch_invariant: bool) -> None:
    """Raise where a call asks for what torch does not promise."""
    if batch_invariant:
        raise ValueError("the reference back-end cannot promise batch_invariant: torch's GEMM orders its sums by shape")


def sum_by_weighting(rows_MK: Tensor, row_map_M: Tensor, S: int) -> Tensor:
    """Return `zeros(S, K).index_add(0, row_map, rows)`, summed in float64, the same bits in every run.

    index_add adds by atomics on a GPU, in any order. index_put sorts there first, and on the CPU adds float64 in order
    (23 us for M = 1024, K = 2 on one Zen 3 core, index_add 65 us).
    """
    sums_SK = rows_MK.new_zeros(S, rows_MK.shape[1], dtype=torch.float64)
    return sums_SK.index_put_((row_map_M.long(),), rows_MK.double(), accumulate=True)


def _weighted_copies(x_MD: Tensor, c_MK: Tensor) -> Tensor:
    """Return c (x) x of shape [M, K * D]: row m holds c_m1 x_m, ..., c_mK x_m."""
    return (c_MK[:, :, None] * x_MD[:, None, :].to(c_MK.dtype)).flatten(1)


def _concatenated(deltas_NKD: Tensor, dtype: torch.dtype) -> Tensor:
    return deltas_NKD.to(dtype).flatten(1)


def _product_with_copies(dy_MN: Tensor, deltas_NKD: Tensor, dtype: torch.dtype) -> Tensor:
    _, K, D = deltas_NKD.shape
    return (dy_MN.to(dtype) @ _concatenated(deltas_NKD, dtype)).view(-1, K, D)
