"""mixed_linear on the GPU by the compiled CUDA extension: the launchers of back-end "cuda".

Few rows, and all rows of a batch_invariant call: the decode kernel, each row with the same bits whatever the batch.
Many bfloat16 rows per weighting on a Hopper GPU: the segments kernel, forward and the gradient to x. The rest runs
Triton's kernels where they are available, else the decode kernel forward and the reference (which refuses
batch_invariant) backward.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from clp_kernels.backend import missing_reason
from clp_kernels.select import DECODE_ROWS, select_form

HOPPER = (9, 0)
SEGMENT_COPIES = 4  # the segments kernel is compiled for 1 to 4


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
    arguments = (x_MD, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK)
    if _runs_segments(x_MD, base_ND, deltas_NKD, c_SK, batch_invariant, exact_delta):
        return torch.ops.clp.mixed_linear_sm90_product(*arguments, False, exact_delta)
    if batch_invariant or x_MD.shape[0] <= DECODE_ROWS or missing_reason("triton") is not None:
        return torch.ops.clp.mixed_linear_cuda_fwd(*arguments)
    return _other_kernels().forward(*arguments, exact_delta=exact_delta)


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
    arguments = (dy_MN, base_ND, deltas_NKD, c_SK, row_map_M)
    if _runs_segments(dy_MN, base_ND, deltas_NKD, c_SK, batch_invariant, exact_delta):
        return torch.ops.clp.mixed_linear_sm90_product(*arguments, None, None, True, exact_delta)
    return _other_kernels().backward_x(*arguments, batch_invariant=batch_invariant, exact_delta=exact_delta)


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
    return _other_kernels().backward_deltas(*arguments, main_grad=main_grad, batch_invariant=batch_invariant)


def _other_kernels() -> ModuleType:
    name = "reference" if missing_reason("triton") is not None else "triton"
    return importlib.import_module(f"clp_kernels.mixed_linear_{name}")


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == HOPPER


def _runs_segments(
    rows: Tensor, base: Tensor | None, deltas: Tensor, c_SK: Tensor, batch_invariant: bool, exact_delta: bool
) -> bool:
    """Return whether the Hopper kernel takes these: shapes, dtypes and what the tensor copy engine wants of strides."""
    dtypes = (rows.dtype, None if base is None else base.dtype)
    return (
        select_form(rows.shape[0], len(c_SK), dtypes, batch_invariant, not exact_delta) == "segments"
        and rows.dtype == torch.bfloat16
        and deltas.dtype in (torch.bfloat16, torch.float32)
        and deltas.shape[1] <= SEGMENT_COPIES
        and all(_is_aligned(tensor) for tensor in (rows, base, deltas) if tensor is not None)
        and _is_hopper(rows.device)
    )


def _is_aligned(tensor: Tensor) -> bool:
    *strides, last = tensor.stride()
    return last == 1 and tensor.data_ptr() % 16 == 0 and all(s * tensor.element_size() % 16 == 0 for s in strides)
