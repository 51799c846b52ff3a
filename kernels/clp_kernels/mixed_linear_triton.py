"""Launchers of the Triton kernels of `mixed_linear`: forward, gradient to x, gradients to deltas and coefficients.

Legend: x_MD, dy_MN, base_ND, deltas_NKD, c_SK, row_map_M with M rows, D in, N out, K copies, S distinct weightings.

Every launcher takes strided inputs, copies none of them, reads no value on the host, uses no atomics and gives the same
bits on every run. A row's result does not depend on the values or weightings of its neighbours. The numbers of rows and
weightings choose the form and the tile, so the bits of a row may differ between batch sizes, unless `batch_invariant`
asks for one tile. What is rounded where is said in `mixed_linear_triton_kernels` and, for many rows of one weighting,
in `mixed_linear_segments_triton_kernels`.
"""

import torch
import triton

from clp_kernels import mixed_linear_panels_triton as panels
from clp_kernels import mixed_linear_segments_triton as segments
from clp_kernels.launch_triton import (
    Tile,
    check_tensors,
    choose_tile,
    dot_precision,
    on_device,
    product_arguments,
    select_gradient_tile,
    select_product_tile,
    sum_by_weighting,
)
from clp_kernels.mixed_linear_triton_kernels import (
    deltas_gradient_kernel,
    mixed_product_kernel,
    row_coefficients_gradient_kernel,
)
from clp_kernels.select import select_form


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
    exact_delta: bool = True,
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
        exact_delta: False lets base and deltas be rounded as one 16-bit weight.

    Returns:
        y [M, N] in x's dtype, contiguous; accumulated in float32, rounded once.

    Raises:
        ValueError: A dtype or device that the kernels do not take.

    Reference: CLP, arXiv 2407.15762, equation 2 (theta_w = sum_k w_k theta_k).
    """
    check_tensors({"x": x_MD, "base": base_ND, "deltas": deltas_NKD})
    form = _select_form(x_MD, base_ND, c_SK, batch_invariant, not exact_delta)
    if form != "streams":
        multiply = segments.multiply if form == "segments" else panels.multiply
        arguments = (x_MD, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK)
        return multiply(*arguments, transposed=False, exact_delta=exact_delta)
    base_strides = (0, 0) if base_ND is None else base_ND.stride()
    return _launch_product(
        x_MD,
        base_ND,
        deltas_NKD,
        c_SK,
        row_map_M,
        kernel="mixed_linear.streams",
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
    exact_delta: bool = True,
    adds_to: torch.Tensor | None = None,
    rows_dtype: torch.dtype | None = None,
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
        exact_delta: As in `forward`.
        adds_to: Contiguous [M, D]; where given, dx is added to it and it is returned.
        rows_dtype: Dtype of x where dy is wider: float32 beside 16-bit x is multiplied in TF32 and not in IEEE.

    Returns:
        dx [M, D] in dy's dtype; accumulated in float32 over n in order, rounded once.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"dy": dy_MN, "base": base_ND, "deltas": deltas_NKD})
    form = _select_form(dy_MN, base_ND, c_SK, batch_invariant, not exact_delta)
    if form != "streams" and adds_to is None and rows_dtype in (None, dy_MN.dtype):
        multiply = segments.multiply if form == "segments" else panels.multiply
        arguments = (dy_MN, base_ND, deltas_NKD, c_SK, row_map_M, None, None)
        return multiply(*arguments, transposed=True, exact_delta=exact_delta)
    stride_n, stride_k, stride_d = deltas_NKD.stride()
    base_strides = (0, 0) if base_ND is None else (base_ND.stride(1), base_ND.stride(0))
    return _launch_product(
        dy_MN,
        base_ND,
        deltas_NKD,
        c_SK,
        row_map_M,
        kernel="mixed_linear.streams.dx",
        num_outs=deltas_NKD.shape[2],
        base_strides=base_strides,
        deltas_strides=(stride_d, stride_k, stride_n),
        bias_N=None,
        bias_deltas_NK=None,
        batch_invariant=batch_invariant,
        adds_to=adds_to,
        rows_dtype=rows_dtype,
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
    check_tensors({"x": x_MD, "dy": dy_MN, "deltas": deltas_NKD})
    d_deltas_NKD = d_c_SK = None
    if needs_deltas and main_grad is not None:
        write_deltas_gradient(dy_MN, x_MD, c_SK, row_map_M, main_grad, adds=True)
    elif needs_deltas:
        d_deltas_NKD = torch.empty(deltas_NKD.shape, dtype=deltas_NKD.dtype, device=deltas_NKD.device)
        write_deltas_gradient(dy_MN, x_MD, c_SK, row_map_M, d_deltas_NKD, adds=False)
    if needs_coefficients:
        d_c_SK = compute_coefficients_gradient(dy_MN, x_MD, deltas_NKD, c_SK, row_map_M)
    return d_deltas_NKD, d_c_SK


def _select_form(
    rows: torch.Tensor, base: torch.Tensor | None, c_SK: torch.Tensor, batch_invariant: bool, rounds_mix: bool
) -> str:
    dtypes = (rows.dtype, None if base is None else base.dtype)
    return select_form(rows.shape[0], len(c_SK), dtypes, batch_invariant, rounds_mix)


def _launch_product(
    a_MR: torch.Tensor,
    base: torch.Tensor | None,
    deltas_NKD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    *,
    kernel: str,
    num_outs: int,
    base_strides: tuple[int, ...],
    deltas_strides: tuple[int, ...],
    bias_N: torch.Tensor | None,
    bias_deltas_NK: torch.Tensor | None,
    batch_invariant: bool,
    adds_to: torch.Tensor | None = None,
    rows_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Launches `kernel`, a_MR (base + sum_k c_k delta_k); strides come as in `product_arguments`."""
    num_rows, num_reduced = a_MR.shape
    out_MO = a_MR.new_empty((num_rows, num_outs)) if adds_to is None else adds_to
    if out_MO.numel() == 0:
        return out_MO
    rows_dtype = rows_dtype or a_MR.dtype

    def heuristic() -> Tile:
        return select_product_tile(num_rows, rows_dtype, batch_invariant)

    if adds_to is None and rows_dtype == a_MR.dtype:
        N, K, D = deltas_NKD.shape
        tile = choose_tile(kernel, a_MR, base, deltas_NKD, (K, N, D), heuristic, batch_invariant)
    else:  # the head's dy, wider than its rows, is not what tables are measured with
        tile = heuristic()
    tensors, strides, constants = product_arguments(
        *(a_MR, base, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK),
        base_strides=base_strides,
        deltas_strides=deltas_strides,
        tile=tile,
        rows_dtype=rows_dtype,
    )
    sizes = (num_rows, num_outs, num_reduced, deltas_NKD.shape[1])
    with on_device(a_MR):
        mixed_product_kernel[(triton.cdiv(num_rows, tile.rows), triton.cdiv(num_outs, tile.outs))](
            *tensors, out_MO, *sizes, *strides, **constants, ADDS=adds_to is not None
        )
    return out_MO


def write_deltas_gradient(
    dy_MN: torch.Tensor,
    x_MD: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    out_NKD: torch.Tensor,
    *,
    adds: bool,
) -> None:
    """Stores the gradient of the deltas in a contiguous out_NKD, or adds it: float32 sums, rounded once."""
    if out_NKD.numel() == 0:
        return
    form = "streams"
    if dy_MN.dtype == x_MD.dtype:  # the head's dy is float32 beside rows of any dtype
        form = _select_form(x_MD, None, c_SK, False, True)
    if form != "streams":
        write = segments.write_gradient if form == "segments" else panels.write_gradient
        return write(dy_MN, x_MD, c_SK, row_map_M, out_NKD, adds=adds)
    N, K, D = out_NKD.shape
    if dy_MN.dtype == x_MD.dtype:
        kernel, sizes = "mixed_linear.streams.d_deltas", (K, N, D)
        tile = choose_tile(kernel, x_MD, None, out_NKD, sizes, lambda: select_gradient_tile(x_MD.dtype))
    else:
        tile = select_gradient_tile(x_MD.dtype)
    grid = (triton.cdiv(N, tile.outs), triton.cdiv(D, tile.reduced), K)
    strides = (*dy_MN.stride(), *x_MD.stride(), *c_SK.stride(), *row_map_M.stride())
    with on_device(x_MD):
        deltas_gradient_kernel[grid](
            *(dy_MN, x_MD, c_SK, row_map_M, out_NKD),
            *(x_MD.shape[0], N, D, K),
            *strides,
            PRECISION=dot_precision(x_MD.dtype, torch.float32),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outs,
            BLOCK_D=tile.reduced,
            ADDS=adds,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def compute_coefficients_gradient(
    dy_MN: torch.Tensor, x_MD: torch.Tensor, deltas_NKD: torch.Tensor, c_SK: torch.Tensor, row_map_M: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of the coefficients [S, K], that of `backward_deltas`."""
    (M, D), (N, K, _) = x_MD.shape, deltas_NKD.shape
    if c_SK.numel() == 0 or M == 0 or N == 0:
        return torch.zeros_like(c_SK)
    tile = select_gradient_tile(x_MD.dtype)
    partial_PMK = torch.empty((triton.cdiv(N, tile.outs), M, K), dtype=torch.float32, device=x_MD.device)
    with on_device(x_MD):
        row_coefficients_gradient_kernel[(triton.cdiv(M, tile.rows), partial_PMK.shape[0], K)](
            *(dy_MN, x_MD, deltas_NKD, partial_PMK),
            *(M, N, D, K),
            *(*dy_MN.stride(), *x_MD.stride(), *deltas_NKD.stride()),
            PRECISION=dot_precision(x_MD.dtype, torch.promote_types(x_MD.dtype, deltas_NKD.dtype)),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outs,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return sum_by_weighting(partial_PMK, row_map_M, len(c_SK)).to(c_SK.dtype)
