"""low_rank_linear on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M rows, D in, N out, R ranks, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

# csrc/low_rank_linear_cpu.cpp sums so many rows at most by a kernel of its own, each by itself, more by torch's GEMM.
STREAMED_ROWS = 16


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
    """Return y_MN in x's dtype and, if `keep_shrink`, `x @ down.T` [M, R] in float32 (else an empty tensor).

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T

    `batch_invariant`: a row's bits depend on nothing but the row, its gates and the weights.
    """
    run, weights = torch.ops.clp.low_rank_linear_cpu_fwd, (base_ND, down_RD, up_NR, gates_SR)
    if not batch_invariant:
        return run(x_MD, *weights, row_map_M, bias_N, keep_shrink)
    blocks = zip(x_MD.split(STREAMED_ROWS), row_map_M.split(STREAMED_ROWS), strict=True)
    y, shrink = zip(*(run(x_BD, *weights, row_map_B, bias_N, keep_shrink) for x_BD, row_map_B in blocks), strict=True)
    return torch.cat(y), torch.cat(shrink)


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
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, base, down, up and gates that `needs` asks for, in their dtypes; else None.

    d_up = dy.T @ (shrink * gates); d_ranks = dy @ up; d_gates[s] = sum of d_ranks * shrink over weighting s's rows;
    d_down = (d_ranks * gates).T @ x; dx = dy @ base + (d_ranks * gates) @ down; d_base = dy.T @ x
    """
    needs_x, *needs_rest = needs
    gradients = torch.ops.clp.low_rank_linear_cpu_backward(
        dy_MN,
        shrink_MR,
        x_MD,
        base_ND,
        down_RD,
        up_NR,
        gates_SR,
        row_map_M,
        needs_x and not batch_invariant,
        *needs_rest,
    )
    if needs_x and batch_invariant:
        # The same operator of dy over the weights the other way round; the other gradients sum over the batch.
        base_DN = None if base_ND is None else base_ND.T.contiguous()
        weights = (base_DN, up_NR.T.contiguous(), down_RD.T.contiguous(), gates_SR)
        gradients = (forward(dy_MN, *weights, row_map_M, None, False, batch_invariant=True)[0], *gradients[1:])
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
