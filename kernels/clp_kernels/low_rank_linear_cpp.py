"""low_rank_linear on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M rows, D in, N out, R ranks, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x_MD: Tensor,
    base_ND: Tensor | None,
    down_RD: Tensor,
    up_NR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    bias_N: Tensor | None,
    keep_shrink: bool,
) -> tuple[Tensor, Tensor]:
    """Return y_MN in x's dtype and, if `keep_shrink`, `x @ down.T` [M, R] in float32 (else an empty tensor).

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T
    """
    return torch.ops.clp.low_rank_linear_cpu_fwd(
        x_MD, base_ND, down_RD, up_NR, gates_SR, row_map_M, bias_N, keep_shrink
    )


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
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, base, down, up and gates that `needs` asks for, in their dtypes; else None.

    d_up = dy.T @ (shrink * gates); d_ranks = dy @ up; d_gates[s] = sum of d_ranks * shrink over weighting s's rows;
    d_down = (d_ranks * gates).T @ x; dx = dy @ base + (d_ranks * gates) @ down; d_base = dy.T @ x
    """
    gradients = torch.ops.clp.low_rank_linear_cpu_backward(
        dy_MN, shrink_MR, x_MD, base_ND, down_RD, up_NR, gates_SR, row_map_M, *needs
    )
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
