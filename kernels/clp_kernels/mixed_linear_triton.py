"""Launchers of the Triton kernels of `mixed_linear`: forward, gradient to x, gradients to deltas and coefficients.

Legend: x_MD, dy_MN, base_ND, deltas_NKD, c_SK, row_map_M with M rows, D in, N out, K copies, S distinct weightings.

Every launcher takes strided inputs, copies none of them, reads no value on the host, uses no atomics and gives the same
bits on every run. A row's result does not depend on the values or weightings of its neighbours (a tile of one weighting
is not special-cased for that reason). The number of rows chooses the tile, so the bits of a row may differ between
batch sizes, unless `batch_invariant` asks for one tile. What is rounded where is said in `mixed_linear_triton_kernels`.
"""

import contextlib
from dataclasses import dataclass

import torch
import triton

from clp_kernels.mixed_linear_triton_kernels import (
    deltas_gradient_kernel,
    mixed_product_kernel,
    row_coefficients_gradient_kernel,
    weighting_sum_kernel,
)

# Triton chooses its CPU interpreter where a kernel is decorated (TRITON_INTERPRET=1 at the first import), for good.
INTERPRETED = not isinstance(mixed_product_kernel, triton.JITFunction)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """The block sizes of one launch: rows, outputs and reduced elements of a program, its warps and pipeline depth."""

    rows: int
    outs: int
    reduced: int
    num_warps: int
    num_stages: int


def select_product_tile(num_rows: int, dtype: torch.dtype, batch_invariant: bool = False) -> Tile:
    """Chooses the tile of x W^T or dy W from the number of rows and the dtype of the rows alone.

    Args:
        num_rows: M, at least 1.
        dtype: Dtype of x; float32 takes smaller tiles because its IEEE products run on the scalar units.
        batch_invariant: One tile for any number of rows: the reduced block sets the order of a row's sum.

    Returns:
        The tile; no choice of it spills registers on sm_80 or sm_90 (tests/clp_kernels/test_aot.py).
    """
    if batch_invariant:
        num_rows = 128
    if num_rows <= 16:
        reduced = 32 if dtype == torch.float32 else 64
        return Tile(rows=16, outs=32, reduced=reduced, num_warps=4, num_stages=4)
    if dtype == torch.float32:
        return Tile(rows=32, outs=64, reduced=32, num_warps=4, num_stages=3)
    if num_rows <= 128:
        return Tile(rows=32, outs=64, reduced=64, num_warps=4, num_stages=3)
    return Tile(rows=64, outs=128, reduced=64, num_warps=8, num_stages=3)


def select_gradient_tile(dtype: torch.dtype) -> Tile:
    """Chooses the tile of d_deltas (outs = rows of the tile's N, reduced = its D) and of the coefficients' gradient."""
    if dtype == torch.float32:
        return Tile(rows=32, outs=32, reduced=64, num_warps=4, num_stages=3)
    return Tile(rows=32, outs=64, reduced=64, num_warps=4, num_stages=3)


def forward(
    x_MD: torch.Tensor,
    base_ND: torch.Tensor | None,
    deltas_NKD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    bias_N: torch.Tensor | None,
    bias_deltas_NK: torch.Tensor | None,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Computes each row's product with its own mixed weight.

    Equivalent torch: `x @ (base + einsum("mk,nkd->mnd", c[row_map], deltas)).mT + bias + c[row_map] @ bias_deltas.T`.

    Args:
        x_MD: Rows, float32, bfloat16 or float16, any strides.
        base_ND: Frozen weight in x's dtype (or float32), or None.
        deltas_NKD: Trained differences in x's dtype, or float32 beside 16-bit rows.
        c_SK: Coefficients, float32.
        row_map_M: int32, row -> weighting, values in [0, S); not checked here (that would sync).
        bias_N: Bias, or None.
        bias_deltas_NK: Trained differences of the bias, or None.
        batch_invariant: True gives a row the same bits in any batch.

    Returns:
        y [M, N] in x's dtype, contiguous; accumulated in float32, rounded once.

    Raises:
        ValueError: A dtype or device that the kernels do not take.

    Reference: CLP, arXiv 2407.15762, equation 2 (theta_w = sum_k w_k theta_k).
    """
    _check(x_MD, base_ND, deltas_NKD)
    base_strides = (0, 0) if base_ND is None else base_ND.stride()
    return _launch_product(
        x_MD,
        base_ND,
        deltas_NKD,
        c_SK,
        row_map_M,
        num_outs=deltas_NKD.shape[0],
        base_strides=base_strides,
        deltas_strides=deltas_NKD.stride(),
        bias_N=bias_N,
        bias_deltas_NK=bias_deltas_NK,
        batch_invariant=batch_invariant,
    )


def backward_x(
    dy_MN: torch.Tensor,
    base_ND: torch.Tensor | None,
    deltas_NKD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Computes the gradient to x: each row of dy times its own mixed weight.

    Equivalent torch: `einsum("mn,mnd->md", dy, base + einsum("mk,nkd->mnd", c[row_map], deltas))`.

    Args:
        dy_MN: Gradient of y, in x's dtype, any strides (an expanded one included).
        base_ND: As in `forward`.
        deltas_NKD: As in `forward`.
        c_SK: As in `forward`.
        row_map_M: As in `forward`.
        batch_invariant: As in `forward`.

    Returns:
        dx [M, D] in dy's dtype; accumulated in float32 over n in order, rounded once.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    _check(dy_MN, base_ND, deltas_NKD)
    stride_n, stride_k, stride_d = deltas_NKD.stride()
    base_strides = (0, 0) if base_ND is None else (base_ND.stride(1), base_ND.stride(0))
    return _launch_product(
        dy_MN,
        base_ND,
        deltas_NKD,
        c_SK,
        row_map_M,
        num_outs=deltas_NKD.shape[2],
        base_strides=base_strides,
        deltas_strides=(stride_d, stride_k, stride_n),
        bias_N=None,
        bias_deltas_NK=None,
        batch_invariant=batch_invariant,
    )


def backward_deltas(
    dy_MN: torch.Tensor,
    x_MD: torch.Tensor,
    deltas_NKD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    *,
    main_grad: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Computes the gradients to the deltas and to the coefficients, each only if it is asked for.

    Equivalent torch: `d_deltas = einsum("mk,mn,md->nkd", c[row_map], dy, x)`;
    `d_c = zeros(S, K).index_add(0, row_map, einsum("mn,md,nkd->mk", dy, x, deltas))` (the bias deltas' share excluded).

    Args:
        dy_MN: Gradient of y, in x's dtype, any strides.
        x_MD: Rows, any strides.
        deltas_NKD: Trained differences.
        c_SK: Coefficients, float32.
        row_map_M: int32, row -> weighting.
        needs_deltas: Whether to compute d_deltas.
        needs_coefficients: Whether to compute d_c.
        main_grad: Where given, d_deltas is added to it (in its dtype, float32) and not returned.
        batch_invariant: Both gradients are the same bits in every run, asked for or not; they sum over the batch.

    Returns:
        d_deltas [N, K, D] in the deltas' dtype, or None; d_c [S, K] in the coefficients' dtype, or None. Both are
        reduced in float32 in a fixed order.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    _check(x_MD, dy_MN, deltas_NKD)
    d_deltas_NKD = None
    if needs_deltas:
        dtype = deltas_NKD.dtype if main_grad is None else main_grad.dtype
        d_deltas_NKD = _launch_deltas_gradient(dy_MN, x_MD, deltas_NKD, c_SK, row_map_M, dtype)
    if d_deltas_NKD is not None and main_grad is not None:
        main_grad.add_(d_deltas_NKD)
        d_deltas_NKD = None
    d_c_SK = _launch_coefficients_gradient(dy_MN, x_MD, deltas_NKD, c_SK, row_map_M) if needs_coefficients else None
    return d_deltas_NKD, d_c_SK


def dot_precision(rows: torch.dtype, weight: torch.dtype) -> str:
    """Names tl.dot's input precision for rows and a weight of these dtypes.

    A float32 weight beside 16-bit rows goes through TF32, which holds the rows exactly; float32 beside float32 is IEEE
    unless `torch.backends.cuda.matmul` allows TF32 (`allow_tf32 = True` or `fp32_precision = "tf32"`).
    """
    if rows != weight and rows != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _check(rows: torch.Tensor, other: torch.Tensor | None, deltas_NKD: torch.Tensor) -> None:
    for name, tensor in (("rows", rows), ("base or dy", other), ("deltas", deltas_NKD)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"the Triton back-end takes float32, bfloat16 and float16, {name} is {tensor.dtype}")
    if not INTERPRETED:
        if rows.device.type == "cpu":
            raise ValueError(
                "the Triton back-end needs a GPU, the rows are on cpu: choose backend='cpp' or 'reference' "
                "(or set TRITON_INTERPRET=1 before triton is imported, for tests)"
            )
    elif torch.bfloat16 in (rows.dtype, deltas_NKD.dtype):
        raise ValueError("Triton's interpreter multiplies bfloat16 as raw bits: use float32 or float16 there")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `tensor` the one that Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_product(
    a_MR: torch.Tensor,
    base: torch.Tensor | None,
    deltas: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    *,
    num_outs: int,
    base_strides: tuple[int, ...],
    deltas_strides: tuple[int, ...],
    bias_N: torch.Tensor | None,
    bias_deltas_NK: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    """Launches a_MR (base + sum_k c_k delta_k); strides come as (output, reduced) and (output, copy, reduced)."""
    num_rows, num_reduced = a_MR.shape
    out_MO = a_MR.new_empty((num_rows, num_outs))
    if out_MO.numel() == 0:
        return out_MO
    tile = select_product_tile(num_rows, a_MR.dtype, batch_invariant)
    grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(num_outs, tile.outs))
    tensors = (a_MR, base, deltas, c_SK, row_map_M, bias_N, bias_deltas_NK, out_MO)
    sizes = (num_rows, num_outs, num_reduced, deltas.shape[1])
    bias_strides = (
        *((0,) if bias_N is None else bias_N.stride()),
        *((0, 0) if bias_deltas_NK is None else bias_deltas_NK.stride()),
    )
    strides = (*a_MR.stride(), *base_strides, *deltas_strides, *c_SK.stride(), *row_map_M.stride(), *bias_strides)
    with on_device(a_MR):
        mixed_product_kernel[grid](
            *tensors,
            *sizes,
            *strides,
            HAS_BASE=base is not None,
            HAS_BIAS=bias_N is not None,
            HAS_BIAS_DELTAS=bias_deltas_NK is not None,
            BASE_PRECISION=dot_precision(a_MR.dtype, a_MR.dtype if base is None else base.dtype),
            DELTAS_PRECISION=dot_precision(a_MR.dtype, deltas.dtype),
            BLOCK_M=tile.rows,
            BLOCK_O=tile.outs,
            BLOCK_R=tile.reduced,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out_MO


def _launch_deltas_gradient(
    dy_MN: torch.Tensor,
    x_MD: torch.Tensor,
    deltas_NKD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    d_deltas_NKD = torch.empty(deltas_NKD.shape, dtype=dtype, device=deltas_NKD.device)
    if d_deltas_NKD.numel() == 0:
        return d_deltas_NKD
    N, K, D = deltas_NKD.shape
    tile = select_gradient_tile(x_MD.dtype)
    grid = (triton.cdiv(N, tile.outs), triton.cdiv(D, tile.reduced), K)
    strides = (*dy_MN.stride(), *x_MD.stride(), *c_SK.stride(), *row_map_M.stride())
    with on_device(x_MD):
        deltas_gradient_kernel[grid](
            *(dy_MN, x_MD, c_SK, row_map_M, d_deltas_NKD),
            *(x_MD.shape[0], N, D, K),
            *strides,
            PRECISION=dot_precision(x_MD.dtype, torch.float32),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outs,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return d_deltas_NKD


def _launch_coefficients_gradient(
    dy_MN: torch.Tensor, x_MD: torch.Tensor, deltas_NKD: torch.Tensor, c_SK: torch.Tensor, row_map_M: torch.Tensor
) -> torch.Tensor:
    d_c_SK = torch.empty(c_SK.shape, dtype=torch.float32, device=c_SK.device)
    (M, D), (N, K, _) = x_MD.shape, deltas_NKD.shape
    if d_c_SK.numel() == 0 or M == 0 or N == 0:
        return d_c_SK.zero_().to(c_SK.dtype)
    tile = select_gradient_tile(x_MD.dtype)
    partial_PMK = torch.empty((triton.cdiv(N, tile.outs), M, K), dtype=torch.float32, device=x_MD.device)
    with on_device(x_MD):
        row_coefficients_gradient_kernel[(triton.cdiv(M, tile.rows), partial_PMK.shape[0], K)](
            *(dy_MN, x_MD, deltas_NKD, partial_PMK),
            *(M, N, D, K),
            *(*dy_MN.stride(), *x_MD.stride(), *deltas_NKD.stride()),
            PRECISION=dot_precision(x_MD.dtype, deltas_NKD.dtype),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outs,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        weighting_sum_kernel[d_c_SK.shape](
            *(partial_PMK, row_map_M, d_c_SK),
            *(M, partial_PMK.shape[0], K, partial_PMK.stride(0)),
            *row_map_M.stride(),
            BLOCK_M=128,
        )
    return d_c_SK.to(c_SK.dtype)
