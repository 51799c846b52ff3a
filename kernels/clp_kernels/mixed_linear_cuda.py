"""mixed_linear on the GPU by the compiled CUDA extension: the launchers of back-end "cuda".

The CUDA kernels compute the forward only, each row with the same bits whatever the batch; both gradients run Triton's
kernels where they are available, else the reference (which refuses batch_invariant). They are meant for decoding. Where
x, base and deltas share a 16-bit dtype, D is a multiple of 8 and N at least 16, tensor cores take up to 64 rows in one
pass over the weights; all else runs on the scalar units, 8 rows a pass. From compute capability 9.0 on, that kernel
starts while the one before it in the stream ends (programmatic dependent launch) and waits for its results by itself.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from clp_kernels.backend import missing_reason


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
) -> Tensor:
    """Return y_MN in x's dtype.

    y = F.linear(x, base, bias) + F.linear(c (x) x, deltas.view(N, K * D)) + c @ bias_deltas.T
    """
    return torch.ops.clp.mixed_linear_cuda_fwd(x_MD, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK)


def backward_x(
    dy_MN: Tensor,
    base_ND: Tensor | None,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Return dx_MD in dy's dtype: `dy @ base + sum_k c_k * (dy @ deltas[:, k])`."""
    return _gradients().backward_x(dy_MN, base_ND, deltas_NKD, c_SK, row_map_M, batch_invariant=batch_invariant)


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
    arguments = (dy_MN, x_MD, deltas_NKD, c_SK, row_map_M, needs_deltas, needs_coefficients)
    return _gradients().backward_deltas(*arguments, main_grad=main_grad, batch_invariant=batch_invariant)


def _gradients() -> ModuleType:
    name = "reference" if missing_reason("triton") is not None else "triton"
    return importlib.import_module(f"clp_kernels.mixed_linear_{name}")
