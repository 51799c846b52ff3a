"""Checks of an operator's arguments, and their normal form: one row per token, one coefficient row per weighting.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Rows(NamedTuple):
    """The row-wise arguments in normal form: x_MD, c_SK (float32 or float64), row_map_M (int32), all contiguous."""

    x_MD: Tensor
    c_SK: Tensor
    row_map_M: Tensor


def flatten_rows(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    row_map: Tensor | None,
) -> Rows:
    """Check every argument of `mixed_linear` and return the row-wise ones in normal form.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names field, both numbers, remedy.
    """
    _check_weights(x, base, deltas, bias, bias_deltas)
    _check_coefficients(x, deltas, coefficients)
    c_SK = coefficients if coefficients.dim() == 2 else coefficients.reshape(-1, coefficients.shape[-1])
    c_SK = c_SK.contiguous()
    row_map_M = _row_map_from_prefix(x, coefficients) if row_map is None else _check_row_map(x, coefficients, row_map)
    # Not reshape(-1, D): it cannot infer M where D is 0.
    x_MD = x if x.dim() == 2 else x.reshape(row_map_M.shape[0], x.shape[-1])
    return Rows(x_MD.contiguous(), c_SK, row_map_M)


def _check_weights(
    x: Tensor, base: Tensor | None, deltas: Tensor, bias: Tensor | None, bias_deltas: Tensor | None
) -> None:
    if deltas.dim() != 3:
        raise ValueError(f"deltas must be [N, K, D], got {_shape(deltas)}; one copy is deltas[:, None, :]")
    N, K, D = deltas.shape
    if x.dim() < 1 or x.shape[-1] != D:
        raise ValueError(f"x must be [..., D] with D = {D} as in deltas {_shape(deltas)}, got x {_shape(x)}")
    if K < 1:
        raise ValueError(f"deltas hold K = {K} copies; at least 1 is needed (F.linear is the layer without copies)")
    for name, tensor, shape in (
        ("base", base, (N, D)),
        ("bias", bias, (N,)),
        ("bias_deltas", bias_deltas, (N, K)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit deltas {_shape(deltas)}, got {_shape(tensor)}")
    for name, tensor in (("x", x), ("base", base), ("deltas", deltas), ("bias", bias), ("bias_deltas", bias_deltas)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move one of them with .to(device)")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
        if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}, x {x.dtype}; float64 takes every argument in float64")


def _check_coefficients(x: Tensor, deltas: Tensor, coefficients: Tensor) -> None:
    K = deltas.shape[1]
    if coefficients.dim() < 1 or coefficients.shape[-1] != K:
        raise ValueError(
            f"coefficients must end in K = {K}, the copies of deltas {_shape(deltas)}, got {_shape(coefficients)}"
        )
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if coefficients.dtype != wanted:
        raise ValueError(f"coefficients are {coefficients.dtype}, must be {wanted}: coefficients.to({wanted})")
    if coefficients.device != x.device:
        raise ValueError(f"coefficients are on {coefficients.device}, x on {x.device}; move one with .to(device)")


def _row_map_from_prefix(x: Tensor, coefficients: Tensor) -> Tensor:
    prefix, rows = coefficients.shape[:-1], x.shape[:-1]
    if rows[: len(prefix)] != prefix:
        raise ValueError(
            f"coefficients {_shape(coefficients)}: their leading sizes {list(prefix)} must be a prefix of x's "
            f"{list(rows)}; give one row per sequence ([B, K]), or [S, K] with row_map"
        )
    S = prefix.numel()
    if S == 1 and not prefix:
        return torch.zeros(rows.numel(), dtype=torch.int32, device=x.device)
    rows_each = rows[len(prefix) :].numel()
    return torch.arange(S, dtype=torch.int32, device=x.device)[:, None].expand(S, rows_each).reshape(-1)


def _check_row_map(x: Tensor, coefficients: Tensor, row_map: Tensor) -> Tensor:
    if coefficients.dim() != 2:
        raise ValueError(f"coefficients must be [S, K] where row_map is given, got {_shape(coefficients)}")
    if row_map.dtype != torch.int32:
        raise ValueError(f"row_map is {row_map.dtype}, must be torch.int32: row_map.to(torch.int32)")
    if row_map.shape != x.shape[:-1]:
        raise ValueError(f"row_map must be {list(x.shape[:-1])}, x without its last size, got {_shape(row_map)}")
    if row_map.device != x.device:
        raise ValueError(f"row_map is on {row_map.device}, x on {x.device}; move one with .to(device)")
    return row_map.reshape(-1).contiguous()


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
