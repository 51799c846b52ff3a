"""mixed_linear on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    `batch_invariant`: a row's bits depend on nothing but the row, its weighting and the weights: neither on the other
    rows, nor on the number of threads.
    `exact_delta`: False lets AMX round a bfloat16 base and its mix as one weight where many rows share a weighting.
    """
    return torch.ops.clp.mixed_linear_cpu_fwd(
        x_MD, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK, batch_invariant, exact_delta
    )


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
    return torch.ops.clp.mixed_linear_cpu_backward_x(
        dy_MN, base_ND, deltas_NKD, c_SK, row_map_M, batch_invariant, exact_delta
    )


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

    d_deltas = (dy.T @ (c (x) x)).view(N, K, D), added in float32 to `main_grad` instead of returned where that is given
    d_c[s, k] = sum of <dy_m, x_m @ deltas[:, k].T> over the rows m of weighting s

    `batch_invariant`: the bits of both, sums over the batch, do not depend on the number of threads.
    """
    d_deltas, d_c = torch.ops.clp.mixed_linear_cpu_backward_deltas(
        dy_MN, x_MD, deltas_NKD, c_SK, row_map_M, needs_deltas, needs_coefficients, main_grad, batch_invariant
    )
    returns_deltas = needs_deltas and main_grad is None
    return d_deltas if returns_deltas else None, d_c if needs_coefficients else None
