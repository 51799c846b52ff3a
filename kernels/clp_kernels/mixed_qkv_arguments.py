"""Checks of mixed_qkv's arguments, and their normal form.

Shapes: M rows, D width, N outputs of a projection, E size of a head, K copies, S distinct weightings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from clp_kernels.arguments import check_floats, flatten_coefficients


class Projection(NamedTuple):
    """The weights of one averaged linear layer: base [N, D], deltas [N, K, D], bias [N], bias_deltas [N, K]."""

    base: Tensor
    deltas: Tensor
    bias: Tensor | None = None
    bias_deltas: Tensor | None = None


class QKVRows(NamedTuple):
    """The row-wise arguments in normal form: x_MD, c_SK, row_map_M (int32), the tables' row for each of x's."""

    x_MD: Tensor
    c_SK: Tensor
    row_map_M: Tensor
    cos_ME: Tensor
    sin_ME: Tensor


def flatten_qkv(
    x: Tensor,
    norm_weight: Tensor,
    projections: Mapping[str, Projection],
    coefficients: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    row_map: Tensor | None,
) -> QKVRows:
    """Check every argument of `mixed_qkv` and return the row-wise ones in normal form.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names field, both numbers, remedy.
    """
    if norm_weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != norm_weight.shape[0] or x.shape[-1] < 1:
        raise ValueError(
            f"x must be [..., D] and norm_weight [D], got x {list(x.shape)}, norm_weight {list(norm_weight.shape)}"
        )
    D, E = x.shape[-1], _size_of_head(x, cos, sin)
    floats = {"x": x, "norm_weight": norm_weight, "cos": cos, "sin": sin, "q_norm": q_norm, "k_norm": k_norm}
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and tuple(norm.shape) != (E,):
            raise ValueError(f"{name} must be [{E}], the size of a head as in cos, got {list(norm.shape)}")
    K = projections["q"].deltas.shape[1] if projections["q"].deltas.dim() == 3 else 0
    for name, projection in projections.items():
        _check_projection(name, projection, D, E, K)
        floats |= {f"{name}.{field}": tensor for field, tensor in projection._asdict().items()}
    check_floats(floats, "x")
    c_SK, row_map_M = flatten_coefficients(coefficients, row_map, x.shape[:-1], K, like=x)
    M = row_map_M.shape[0]
    tables = (table.expand(*x.shape[:-1], E).reshape(M, E).contiguous() for table in (cos, sin))
    return QKVRows(x.reshape(M, D).contiguous(), c_SK, row_map_M, *tables)


def _size_of_head(x: Tensor, cos: Tensor, sin: Tensor) -> int:
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"sin must be like cos, got cos {list(cos.shape)} {cos.dtype}, sin {list(sin.shape)} {sin.dtype}"
        )
    E, rows = cos.shape[-1] if cos.dim() else 0, x.shape[:-1]
    if E < 2 or E % 2:
        raise ValueError(f"cos must be [..., E] with an even size of a head E, got {list(cos.shape)}")
    sizes = cos.shape[:-1]
    ones = next((i for i, size in enumerate(sizes) if size != 1), len(sizes))
    fits = len(sizes) <= len(rows) and any(
        sizes[i:] == rows[len(rows) - len(sizes) + i :] for i in range(min(ones, len(sizes)) + 1)
    )
    if not fits:
        raise ValueError(
            f"cos {list(cos.shape)} must have x's leading sizes {list(rows)}, or the last of them behind sizes of 1"
        )
    return E


def _check_projection(name: str, projection: Projection, D: int, E: int, K: int) -> None:
    base, deltas, bias, bias_deltas = projection
    if deltas.dim() != 3 or deltas.shape[1:] != (K, D) or K < 1:
        raise ValueError(
            f"{name}.deltas must be [N, K, D] with D = {D} as in x and the K copies of q.deltas, got "
            f"{list(deltas.shape)}"
        )
    N = deltas.shape[0]
    if N % E:
        raise ValueError(f"{name}.deltas have N = {N} outputs, no multiple of the size of a head {E} as in cos")
    for field, tensor, shape in (("base", base, (N, D)), ("bias", bias, (N,)), ("bias_deltas", bias_deltas, (N, K))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}.{field} must be {list(shape)} to fit {name}.deltas {list(deltas.shape)}, got "
                f"{list(tensor.shape)}"
            )
