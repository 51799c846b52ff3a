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
) -> Tensor:
    """Return y_MN in x's dtype.

    y = F.linear(x, base, bias) + F.linear(c (x) x, deltas.view(N, K * D)) + c @ bias_deltas.T
    """
    return torch.ops.clp.mixed_linear_cpu_fwd(x_MD, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK)


def backward_x(dy_MN: Tensor, base_ND: Tensor | None, deltas_NKD: Tensor, c_SK: Tensor, row_map_M: Tensor) -> Tensor:
    """Return dx_MD in dy's dtype: `dy @ base + sum_k c_k * (dy @ deltas[:, k])`."""
    return torch.ops.clp.mixed_linear_cpu_backward_x(dy_MN, base_ND, deltas_NKD, c_SK, row_map_M)


def backward_deltas(
    dy_MN: Tensor,
    x_MD: Tensor,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the deltas [N, K, D] (in their dtype) and of the coefficients [S, K]; None if not needed.

    d_deltas = (dy.T @ (c (x) x)).view(N, K, D)
    d_c[s, k] = sum of <dy_m, x_m @ deltas[:, k].T> over the rows m of weighting s
    """
    d_deltas, d_c = torch.ops.clp.mixed_linear_cpu_backward_deltas(
        dy_MN, x_MD, deltas_NKD, c_SK, row_map_M, needs_deltas, needs_coefficients
    )
    return d_deltas if needs_deltas else None, d_c if needs_coefficients else None
