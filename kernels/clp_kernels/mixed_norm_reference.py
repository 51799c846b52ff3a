"""mixed_norm in plain torch: the definition, the fallback on any device, and in float64 the tests' oracle.

Shapes: M rows, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.mixed_linear_reference import sum_by_weighting
from clp_kernels.mixed_norm_arguments import flatten_norm_rows


def mixed_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    weight_deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    offset: float = 0.0,
    cast_before_scale: bool = False,
) -> Tensor:
    """Compute `mixed_norm` row by row, differentiable by plain autograd.

    y = norm(x.float()) * (offset + weight + weight_deltas @ c) + bias + bias_deltas @ c  # c: the row's coefficients

    Arguments, shapes and errors are those of `mixed_norm`. Where every coefficient is 0, the bits are those of the
    modules that `mixed_norm` names. Computes in float32 (float64 for float64 input).
    """
    rows = flatten_norm_rows(x, weight, weight_deltas, coefficients, bias, bias_deltas, row_map, kind)
    parameters = (weight, weight_deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas)
    return forward(rows.x_MD, *parameters, eps, kind == "layer", offset, cast_before_scale).view(x.shape)


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
    """Return y_MD in x's dtype.

    y = norm(x.float()) * (offset + weight + weight_deltas @ c) + bias + bias_deltas @ c
    """
    accumulator = torch.promote_types(x_MD.dtype, torch.float32)
    with torch.autocast(x_MD.device.type, enabled=False):
        n_MD = _normalise(x_MD.to(accumulator), eps, is_centered)[0]
        if cast_before_scale:
            n_MD = n_MD.to(x_MD.dtype).to(accumulator)
        y_MD = n_MD * (offset + _mix_rows(weight_D, weight_deltas_DK, c_SK, row_map_M, accumulator))
        if bias_D is not None or bias_deltas_DK is not None:
            y_MD = y_MD + _mix_rows(bias_D, bias_deltas_DK, c_SK, row_map_M, accumulator)
    return y_MD.to(x_MD.dtype)


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
    """Return the gradients of x, weight, weight_deltas, bias, bias_deltas and coefficients; None if not needed.

    That of x in its dtype, the others in float32 (float64 for float64 input). With g = dy * (offset + mixed weight),
    xhat = norm(x) and rstd the factor of xhat: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), for RMSNorm without
    mean(g). What was rounded by `cast_before_scale` counts as rounded for the weights and as not rounded for x.
    """
    accumulator = torch.promote_types(x_MD.dtype, torch.float32)
    with torch.autocast(x_MD.device.type, enabled=False):
        xhat_MD, rstd_M1 = _normalise(x_MD.to(accumulator), eps, is_centered)
        dy_MD, dtype = dy_MD.to(accumulator), dy_MD.dtype
        n_MD = xhat_MD.to(x_MD.dtype).to(accumulator) if cast_before_scale else xhat_MD
        c_MK = c_SK.to(accumulator).index_select(0, row_map_M)
        dx_MD = d_c_SK = None
        if needs_x:
            g_MD = dy_MD * (offset + _mix_rows(weight_D, weight_deltas_DK, c_SK, row_map_M, accumulator))
            mean_M1 = g_MD.mean(-1, keepdim=True) if is_centered else 0.0
            along_x_M1 = (g_MD * xhat_MD).mean(-1, keepdim=True)
            dx_MD = (rstd_M1 * (g_MD - mean_M1 - xhat_MD * along_x_M1)).to(dtype)
        terms_MD = dy_MD * n_MD
        if needs_coefficients:
            d_c_MK = terms_MD @ weight_deltas_DK.to(accumulator)
            if bias_deltas_DK is not None:
                d_c_MK = d_c_MK + dy_MD @ bias_deltas_DK.to(accumulator)
            d_c_SK = sum_by_weighting(d_c_MK, row_map_M, c_SK.shape[0]).to(c_SK.dtype)
        return (
            dx_MD,
            terms_MD.sum(0) if needs_weight else None,
            terms_MD.T @ c_MK if needs_weight_deltas else None,
            dy_MD.sum(0) if needs_bias else None,
            dy_MD.T @ c_MK if needs_bias_deltas else None,
            d_c_SK,
        )


def _normalise(x_MD: Tensor, eps: float, is_centered: bool) -> tuple[Tensor, Tensor]:
    """Return x without its mean and scale, and the factor rstd [M, 1] that took the scale out."""
    if is_centered:
        xhat_MD, _, rstd_M1 = torch.native_layer_norm(x_MD, x_MD.shape[-1:], None, None, eps)
        return xhat_MD, rstd_M1
    rstd_M1 = torch.rsqrt(x_MD.pow(2).mean(-1, keepdim=True) + eps)
    return x_MD * rstd_M1, rstd_M1


def _mix_rows(
    parameter_D: Tensor | None, deltas_DK: Tensor | None, c_SK: Tensor, row_map_M: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return each row's `parameter + deltas @ c`, [M, D], or [1, D] where no deltas make the rows differ."""
    if deltas_DK is None:
        assert parameter_D is not None
        return parameter_D.to(dtype)[None]
    mixed_SD = c_SK.to(dtype) @ deltas_DK.to(dtype).T
    if parameter_D is not None:
        mixed_SD = parameter_D.to(dtype) + mixed_SD
    return mixed_SD.index_select(0, row_map_M)
