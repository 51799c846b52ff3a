"""Launchers of the Triton kernels of `mixed_norm`: back-end "triton".

Shapes: M rows, D width, K copies, S distinct weightings, P splits of the rows.

Every launcher takes strided inputs, copies none of them, reads no value on the host, uses no atomics and gives the same
bits on every run. A row's y and dx have the same bits in any batch: D alone chooses the blocks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import Tile, check_tensors, choose_tile, on_device, sum_by_weighting
from clp_kernels.mixed_norm_triton_kernels import (
    coefficient_terms_kernel,
    input_gradient_kernel,
    mixed_norm_kernel,
    parameter_gradients_kernel,
)


def select_row_blocks(num_ins: int) -> tuple[int, int, int]:
    """Chooses from D alone the rows of a program, the elements of each that it reads at once, and its warps.

    Four rows share each read of the parameters; a thread has 16 elements.
    """
    block_d = min(1024, max(128, triton.next_power_of_2(num_ins)))
    return 4, block_d, block_d // 128


def select_norm_tile(num_ins: int) -> Tile:
    """Chooses the tile of the forward: the blocks of `select_row_blocks`."""
    block_m, block_d, num_warps = select_row_blocks(num_ins)
    return Tile(rows=block_m, reduced=block_d, num_warps=num_warps)


def select_row_splits(num_rows: int) -> tuple[int, int]:
    """Chooses into how many partial sums the rows go for the gradients of the parameters, and the rows of each.

    At least 32 rows each, at most 64 partial sums: those are read once more.
    """
    size = max(32, triton.cdiv(num_rows, 64))
    return triton.cdiv(num_rows, size), size


def forward(
    x_MD: Tensor,
    weight_D: Tensor | None,
    weight_deltas_DK: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    bias_D: Tensor | None,
    bias_deltas_DK: Tensor | None,
    eps: float,
    is_centered: bool,
    offset: float,
    cast_before_scale: bool,
) -> Tensor:
    """Returns y_MD in x's dtype; arguments and result are those of `mixed_norm_reference.forward`.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    parameters = {"weight": weight_D, "weight_deltas": weight_deltas_DK, "bias": bias_D, "bias_deltas": bias_deltas_DK}
    check_tensors({"x": x_MD, **parameters})
    M, D = x_MD.shape
    y_MD = x_MD.new_empty(M, D)
    if M == 0:
        return y_MD
    sizes = (weight_deltas_DK.shape[1], 1, D)
    tile = choose_tile("mixed_norm", x_MD, weight_D, weight_deltas_DK, sizes, lambda: select_norm_tile(D))
    strides = (*_strides(weight_D, 1), *weight_deltas_DK.stride(), *c_SK.stride(), *row_map_M.stride())
    with on_device(x_MD):
        mixed_norm_kernel[(triton.cdiv(M, tile.rows),)](
            *(x_MD, weight_D, weight_deltas_DK, c_SK, row_map_M, bias_D, bias_deltas_DK, y_MD),
            *(M, D, weight_deltas_DK.shape[1], eps, offset),
            *(*x_MD.stride(), *strides, *_strides(bias_D, 1), *_strides(bias_deltas_DK, 2)),
            IS_CENTERED=is_centered,
            CASTS_BEFORE_SCALE=cast_before_scale,
            HAS_WEIGHT=weight_D is not None,
            HAS_BIAS=bias_D is not None,
            HAS_BIAS_DELTAS=bias_deltas_DK is not None,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
        )
    return y_MD


def backward(
    dy_MD: Tensor,
    x_MD: Tensor,
    weight_D: Tensor | None,
    weight_deltas_DK: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    bias_deltas_DK: Tensor | None,
    eps: float,
    is_centered: bool,
    offset: float,
    cast_before_scale: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_weight_deltas: bool,
    needs_bias: bool,
    needs_bias_deltas: bool,
    needs_coefficients: bool,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients that are asked for; arguments and result are those of `mixed_norm_reference.backward`.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    parameters = {"weight": weight_D, "weight_deltas": weight_deltas_DK, "bias_deltas": bias_deltas_DK}
    check_tensors({"x": x_MD, "dy": dy_MD, **parameters})
    norm = (eps, is_centered, offset)
    dx_MD, statistics_2M = _input_gradient(dy_MD, x_MD, weight_D, weight_deltas_DK, c_SK, row_map_M, norm, needs_x)
    d_c_SK, has_bias = None, needs_bias or needs_bias_deltas
    if needs_coefficients:
        terms_MK = _coefficient_terms(dy_MD, x_MD, weight_deltas_DK, bias_deltas_DK, statistics_2M, cast_before_scale)
        d_c_SK = sum_by_weighting(terms_MK[None], row_map_M, c_SK.shape[0]).to(c_SK.dtype)
    if not (needs_weight or needs_weight_deltas or has_bias):
        return dx_MD, None, None, None, None, d_c_SK
    # [P, 1 or 2, 1 + K, D]: of scale and bias, the parameter's own and then its copies'.
    partial = _parameter_gradients(dy_MD, x_MD, statistics_2M, c_SK, row_map_M, cast_before_scale, has_bias)
    return (
        dx_MD,
        partial[:, 0, 0].sum(0) if needs_weight else None,
        partial[:, 0, 1:].sum(0).T.contiguous() if needs_weight_deltas else None,
        partial[:, 1, 0].sum(0) if needs_bias else None,
        partial[:, 1, 1:].sum(0).T.contiguous() if needs_bias_deltas else None,
        d_c_SK,
    )


def _strides(tensor: Tensor | None, dim: int) -> tuple[int, ...]:
    return (0,) * dim if tensor is None else tensor.stride()


def _input_gradient(
    dy_MD: Tensor,
    x_MD: Tensor,
    weight_D: Tensor | None,
    weight_deltas_DK: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    norm: tuple[float, bool, float],
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Returns dx in x's dtype if it is asked for, and every row's mean and rstd, [2, M] float32."""
    (M, D), (eps, is_centered, offset) = x_MD.shape, norm
    statistics_2M = torch.empty(2, M, dtype=torch.float32, device=x_MD.device)
    dx_MD = x_MD.new_empty(M, D) if needs_x else None
    if M == 0:
        return dx_MD, statistics_2M
    block_m, block_d, num_warps = select_row_blocks(D)
    strides = (*_strides(weight_D, 1), *weight_deltas_DK.stride(), *c_SK.stride(), *row_map_M.stride())
    with on_device(x_MD):
        input_gradient_kernel[(triton.cdiv(M, block_m),)](
            *(dy_MD, x_MD, weight_D, weight_deltas_DK, c_SK, row_map_M, dx_MD, statistics_2M),
            *(M, D, weight_deltas_DK.shape[1], eps, offset),
            *(*dy_MD.stride(), *x_MD.stride(), *strides),
            IS_CENTERED=is_centered,
            HAS_WEIGHT=weight_D is not None,
            NEEDS_X=needs_x,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=False,  # g - mean(g) is zero where all g are equal, not what a fused product leaves of it
        )
    return dx_MD, statistics_2M


def _coefficient_terms(
    dy_MD: Tensor,
    x_MD: Tensor,
    weight_deltas_DK: Tensor,
    bias_deltas_DK: Tensor | None,
    statistics_2M: Tensor,
    cast_before_scale: bool,
) -> Tensor:
    """Returns dy @ of what each copy adds to y per unit of its coefficient, [M, K] float32."""
    (M, D), K = x_MD.shape, weight_deltas_DK.shape[1]
    terms_MK = torch.empty(M, K, dtype=torch.float32, device=x_MD.device)
    if M == 0:
        return terms_MK
    block_m, block_d, num_warps = select_row_blocks(D)
    with on_device(x_MD):
        coefficient_terms_kernel[(triton.cdiv(M, block_m), K)](
            *(dy_MD, x_MD, weight_deltas_DK, bias_deltas_DK, statistics_2M, terms_MK),
            *(M, D, K),
            *(*dy_MD.stride(), *x_MD.stride(), *weight_deltas_DK.stride(), *_strides(bias_deltas_DK, 2)),
            CASTS_BEFORE_SCALE=cast_before_scale,
            HAS_BIAS_DELTAS=bias_deltas_DK is not None,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
    return terms_MK


def _parameter_gradients(
    dy_MD: Tensor,
    x_MD: Tensor,
    statistics_2M: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    cast_before_scale: bool,
    has_bias: bool,
) -> Tensor:
    """Returns P partial sums over rows of a (x) dy norm(x), and with `has_bias` of a (x) dy, where a = (1, c_1 .. c_K).

    [P, 1 or 2, 1 + K, D] float32.
    """
    (M, D), K = x_MD.shape, c_SK.shape[1]
    P, split_size = select_row_splits(M)
    partial = torch.empty(P, 1 + has_bias, 1 + K, D, dtype=torch.float32, device=x_MD.device)
    if M == 0:
        return partial  # of no parts: their sum is zero
    block_k, block_d = min(8, triton.next_power_of_2(1 + K)), min(256, max(16, triton.next_power_of_2(D)))
    with on_device(x_MD):
        parameter_gradients_kernel[(triton.cdiv(D, block_d), P, triton.cdiv(1 + K, block_k))](
            *(dy_MD, x_MD, statistics_2M, c_SK, row_map_M, partial),
            *(M, D, K, split_size),
            *(*dy_MD.stride(), *x_MD.stride(), *c_SK.stride(), *row_map_M.stride()),
            CASTS_BEFORE_SCALE=cast_before_scale,
            NEEDS_BIAS=has_bias,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=2,
        )
    return partial
