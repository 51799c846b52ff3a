"""low_rank_linear in plain torch: the definition, the fallback on any device, and in float64 the tests' oracle.

Shapes: M rows, D in, N out, R ranks, S distinct weightings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.arguments import flatten_low_rank_rows
from clp_kernels.mixed_linear_reference import refuse_batch_invariant, sum_by_weighting


def low_rank_linear_ref(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    row_map: Tensor | None = None,
) -> Tensor:
    """Compute `low_rank_linear` in plain torch, differentiable by plain autograd.

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T

    Arguments, shapes and errors are those of `low_rank_linear`. The base part is F.linear itself, so a zero `up` gives
    the plain layer's bits; in 16 bits it is therefore rounded before the low-rank part is added, and an effect of less
    than half a unit in its last place is lost. The low-rank part is float32 (float64 for float64 input).
    """
    rows = flatten_low_rank_rows(x, base, down, up, gates, bias, row_map)
    y_MN, _ = forward(rows.x_MD, base, down, up, rows.c_SK, rows.row_map_M, bias, False)
    return y_MN.view(*x.shape[:-1], up.shape[0])


def forward(
    x_MD: Tensor,
    base_ND: Tensor | None,
    down_RD: Tensor,
    up_NR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    bias_N: Tensor | None,
    keep_shrink: bool,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y_MN in x's dtype, and `x @ down.T` [M, R] in float32, which the backward needs.

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T
    """
    refuse_batch_invariant(batch_invariant)
    accumulator = torch.promote_types(x_MD.dtype, torch.float32)
    with torch.autocast(x_MD.device.type, enabled=False):
        shrink_MR = F.linear(x_MD.to(accumulator), down_RD.to(accumulator))
        # Negated and subtracted: a product over a zero `up` is +0, and y - (+0) keeps the sign of a y of -0.0.
        minus_gated_MR = shrink_MR * -gates_SR.index_select(0, row_map_M)
        minus_y_MN = F.linear(minus_gated_MR, up_NR.to(accumulator))
        bias_N = None if bias_N is None else bias_N.to(x_MD.dtype)
        if base_ND is not None:
            y_MN = F.linear(x_MD, base_ND.to(x_MD.dtype), bias_N).to(accumulator) - minus_y_MN
        else:
            y_MN = -minus_y_MN if bias_N is None else bias_N.to(accumulator) - minus_y_MN
    return y_MN.to(x_MD.dtype), shrink_MR


def backward(
    dy_MN: Tensor,
    shrink_MR: Tensor,
    x_MD: Tensor,
    base_ND: Tensor | None,
    down_RD: Tensor,
    up_NR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, base, down, up and gates that `needs` asks for, in their dtypes; else None.

    d_up = dy.T @ (shrink * gates); d_ranks = dy @ up; d_gates[s] = sum of d_ranks * shrink over weighting s's rows;
    d_down = (d_ranks * gates).T @ x; dx = dy @ base + (d_ranks * gates) @ down; d_base = dy.T @ x
    """
    refuse_batch_invariant(batch_invariant)
    needs_x, needs_base, needs_down, needs_up, needs_gates = needs
    accumulator = torch.promote_types(dy_MN.dtype, torch.float32)
    dx_MD = d_base_ND = d_down_RD = d_up_NR = d_gates_SR = None
    gates_MR = gates_SR.index_select(0, row_map_M)
    with torch.autocast(dy_MN.device.type, enabled=False):
        wide_dy_MN = dy_MN.to(accumulator)
        if needs_up:
            d_up_NR = (wide_dy_MN.T @ (shrink_MR * gates_MR)).to(up_NR.dtype)
        d_ranks_MR = wide_dy_MN @ up_NR.to(accumulator)
        if needs_gates:
            d_gates_SR = sum_by_weighting(d_ranks_MR * shrink_MR, row_map_M, gates_SR.shape[0]).to(gates_SR.dtype)
        d_shrink_MR = d_ranks_MR * gates_MR
        if needs_down:
            d_down_RD = (d_shrink_MR.T @ x_MD.to(accumulator)).to(down_RD.dtype)
        if needs_x:
            wide_dx_MD = d_shrink_MR @ down_RD.to(accumulator)
            if base_ND is not None:
                wide_dx_MD += dy_MN @ base_ND.to(dy_MN.dtype)
            dx_MD = wide_dx_MD.to(x_MD.dtype)
        if needs_base and base_ND is not None:
            d_base_ND = (wide_dy_MN.T @ x_MD.to(accumulator)).to(base_ND.dtype)
    return dx_MD, d_base_ND, d_down_RD, d_up_NR, d_gates_SR
