"""Checks of mixed_embedding's arguments, and their normal form.

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels.arguments import check_floats, flatten_coefficients


class Positions(NamedTuple):
    """The arguments per token position in normal form: ids_M (int64), c_SK, row_map_M (int32), all contiguous."""

    ids_M: Tensor
    c_SK: Tensor
    row_map_M: Tensor
    padding_idx: int  # -1: none


def flatten_positions(
    ids: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    row_map: Tensor | None,
    padding_idx: int | None,
) -> Positions:
    """Check every argument of `mixed_embedding` but the values of `ids`; return those per position in normal form.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names field, both numbers, remedy.
    """
    if deltas.dim() != 3:
        raise ValueError(f"deltas must be [V, K, D], got {list(deltas.shape)}; one copy is deltas[:, None, :]")
    V, K, D = deltas.shape
    if K < 1:
        raise ValueError(f"deltas hold K = {K} copies; at least 1 is needed (F.embedding is the one without copies)")
    if base is not None and base.shape != (V, D):
        raise ValueError(f"base must be {[V, D]} to fit deltas {[V, K, D]}, got {list(base.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids are {ids.dtype}, must be torch.int64 or torch.int32: ids.long()")
    if ids.device != deltas.device:
        raise ValueError(f"ids are on {ids.device}, deltas on {deltas.device}; move one of them with .to(device)")
    check_floats({"deltas": deltas, "base": base}, "deltas")
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"padding_idx is {padding_idx}, outside [-{V}, {V}) of the embedding's rows; None for none")
    c_SK, row_map_M = flatten_coefficients(coefficients, row_map, ids.shape, K, like=deltas, of="ids")
    padding_idx = -1 if padding_idx is None else padding_idx % V
    return Positions(ids.reshape(-1).long().contiguous(), c_SK, row_map_M, padding_idx)
