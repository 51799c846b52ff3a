"""Checks of an operator's arguments, and their normal form: one row per token, one coefficient row per weighting.

Shapes: M rows, D in, N out, K copies, R ranks, S distinct weightings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Per(NamedTuple):
    """What a row of coefficients holds one number for, in the words of the messages."""

    field: str
    letter: str
    owner: str


_COPIES = _Per("coefficients", "K", "the copies of the deltas")
_RANKS = _Per("gates", "R", "the ranks of down and up")


class Rows(NamedTuple):
    """The row-wise arguments in normal form: x_MD, c_SK (float32 or float64), row_map_M (int32), all contiguous.

    For `low_rank_linear` the coefficients are its gates, [S, R].
    """

    x_MD: Tensor
    c_SK: Tensor
    row_map_M: Tensor


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that a surrounding autocast asks for; it is the only argument that autocast casts."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


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
    return _flatten(x, *flatten_coefficients(coefficients, row_map, x.shape[:-1], deltas.shape[1], like=x))


def flatten_low_rank_rows(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    row_map: Tensor | None,
) -> Rows:
    """Check every argument of `low_rank_linear` and return the row-wise ones in normal form.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names field, both numbers, remedy.
    """
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"down must be [R, D] and up [N, R] with the same R ranks, got down {_shape(down)}, up {_shape(up)}"
        )
    (R, D), N = down.shape, up.shape[0]
    if x.dim() < 1 or x.shape[-1] != D:
        raise ValueError(f"x must be [..., D] with D = {D} as in down {_shape(down)}, got x {_shape(x)}")
    for name, tensor, shape in (("base", base, (N, D)), ("bias", bias, (N,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit up {_shape(up)}, got {_shape(tensor)}")
    check_floats({"x": x, "base": base, "down": down, "up": up, "bias": bias}, "x")
    return _flatten(x, *flatten_coefficients(gates, row_map, x.shape[:-1], R, like=x, per=_RANKS))


def _flatten(x: Tensor, c_SK: Tensor, row_map_M: Tensor) -> Rows:
    # Not reshape(-1, D): it cannot infer M where D is 0.
    x_MD = x if x.dim() == 2 else x.reshape(row_map_M.shape[0], x.shape[-1])
    return Rows(x_MD.contiguous(), c_SK, row_map_M)


def check_main_grad(deltas: Tensor) -> Tensor | None:
    """Return the buffer `deltas.main_grad` that the gradient of the deltas is added to, None where there is none.

    Raises:
        ValueError: it does not fit; the message names both shapes or dtypes and the remedy.
    """
    main_grad: Tensor | None = getattr(deltas, "main_grad", None)
    if main_grad is None:
        return None
    if main_grad.shape != deltas.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"deltas.main_grad is {_shape(main_grad)}, strides {main_grad.stride()}; it must be contiguous and like "
            f"deltas {_shape(deltas)}"
        )
    wanted = torch.promote_types(deltas.dtype, torch.float32)
    if main_grad.dtype != wanted or main_grad.device != deltas.device:
        raise ValueError(
            f"deltas.main_grad is {main_grad.dtype} on {main_grad.device}, must be {wanted} on {deltas.device}"
        )
    return main_grad


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
    tensors = {"x": x, "base": base, "deltas": deltas, "bias": bias, "bias_deltas": bias_deltas}
    check_floats(tensors, "x")


def flatten_coefficients(
    coefficients: Tensor,
    row_map: Tensor | None,
    rows: torch.Size,
    K: int,
    like: Tensor,
    of: str = "x",
    per: _Per = _COPIES,
) -> tuple[Tensor, Tensor]:
    """Check the coefficients and row map of any operator and return c_SK and row_map_M, both contiguous.

    Args:
        coefficients: [..., K], its leading sizes a prefix of `rows`; [S, K] with `row_map`.
        row_map: int32 of shape `rows`, or None.
        rows: the shape of the operator's rows, x.shape[:-1] or ids.shape.
        K: copies of the deltas.
        like: a tensor whose device the coefficients share; float64 asks for float64 coefficients.
        of: the argument that `rows` is taken from, for the messages.
        per: what the coefficients stand for, for the messages.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names field, both numbers, remedy.
    """
    _check_coefficients(coefficients, K, like, of, per)
    c_SK = coefficients
    if c_SK.dim() != 2:  # not reshape(-1, K): it cannot infer S where K is 0
        c_SK = c_SK.reshape(coefficients.shape[:-1].numel(), K)
    if row_map is None:
        return c_SK.contiguous(), _row_map_from_prefix(coefficients, rows, of, per)
    return c_SK.contiguous(), _check_row_map(coefficients, row_map, rows, of, per)


def _check_coefficients(coefficients: Tensor, K: int, like: Tensor, of: str, per: _Per) -> None:
    field, letter, owner = per
    if coefficients.dim() < 1 or coefficients.shape[-1] != K:
        raise ValueError(f"{field} must end in {letter} = {K}, {owner}, got {_shape(coefficients)}")
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if coefficients.dtype != wanted:
        raise ValueError(f"{field} are {coefficients.dtype}, must be {wanted}: {field}.to({wanted})")
    if coefficients.device != like.device:
        raise ValueError(f"{field} are on {coefficients.device}, {of} on {like.device}; move one with .to(device)")


def _row_map_from_prefix(coefficients: Tensor, rows: torch.Size, of: str, per: _Per) -> Tensor:
    prefix = coefficients.shape[:-1]
    if rows[: len(prefix)] != prefix:
        raise ValueError(
            f"{per.field} {_shape(coefficients)}: their leading sizes {list(prefix)} must be a prefix of {of}'s "
            f"{list(rows)}; give one row per sequence ([B, {per.letter}]), or [S, {per.letter}] with row_map"
        )
    S = prefix.numel()
    if S == 1 and not prefix:
        return torch.zeros(rows.numel(), dtype=torch.int32, device=coefficients.device)
    rows_each = rows[len(prefix) :].numel()
    return torch.arange(S, dtype=torch.int32, device=coefficients.device)[:, None].expand(S, rows_each).reshape(-1)


def _check_row_map(coefficients: Tensor, row_map: Tensor, rows: torch.Size, of: str, per: _Per) -> Tensor:
    if coefficients.dim() != 2:
        raise ValueError(f"{per.field} must be [S, {per.letter}] where row_map is given, got {_shape(coefficients)}")
    if row_map.dtype != torch.int32:
        raise ValueError(f"row_map is {row_map.dtype}, must be torch.int32: row_map.to(torch.int32)")
    if row_map.shape != rows:
        raise ValueError(f"row_map must be {list(rows)}, one entry for each row of {of}, got {_shape(row_map)}")
    if row_map.device != coefficients.device:
        raise ValueError(
            f"row_map is on {row_map.device}, {of} on {coefficients.device}; move one of them with .to(device)"
        )
    return row_map.reshape(-1).contiguous()


def check_floats(tensors: Mapping[str, Tensor | None], like: str) -> None:
    """Check that tensors are floating, on one device, and all float64 or none.

    Args:
        tensors: argument name -> tensor; None is skipped.
        like: the name of the argument that the others are compared with.

    Raises:
        ValueError: a dtype or device that does not fit, by name.
    """
    first = tensors[like]
    assert first is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, {like} on {first.device}; move one of them with .to(device)"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}, {like} {first.dtype}; float64 takes every argument in float64")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
