"""mixed_embedding in plain torch: the definition, the fallback on any device, and in float64 the tests' oracle.

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clp_kernels.mixed_embedding_arguments import flatten_positions
from clp_kernels.mixed_linear_reference import sum_by_weighting


def mixed_embedding_ref(
    ids: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    *,
    row_map: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute `mixed_embedding` by one look-up per table, differentiable by plain autograd.

    y = F.embedding(ids, base) + einsum("mk,mkd->md", c, F.embedding(ids, deltas.flatten(1)).unflatten(1, (K, D)))

    Arguments, shapes and errors are those of `mixed_embedding`. Zero deltas give F.embedding's bits. Adds in float32
    (float64 for float64 input).
    """
    p = flatten_positions(ids, base, deltas, coefficients, row_map, padding_idx)
    return _mix(p.ids_M, base, deltas, p.c_SK, p.row_map_M, p.padding_idx).view(*ids.shape, deltas.shape[2])


def forward(ids_M: Tensor, base_VD: Tensor | None, deltas_VKD: Tensor, c_SK: Tensor, row_map_M: Tensor) -> Tensor:
    """Return y_MD in the base's dtype, in the deltas' where base is None.

    y = F.embedding(ids, base) + einsum("mk,mkd->md", c, F.embedding(ids, deltas.flatten(1)).unflatten(1, (K, D)))
    """
    return _mix(ids_M, base_VD, deltas_VKD, c_SK, row_map_M, -1)


def backward(
    dy_MD: Tensor,
    ids_M: Tensor,
    deltas_VKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    padding_idx: int,
    needs_base: bool,
    needs_deltas: bool,
    needs_coefficients: bool,
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of base [V, D] (dy's dtype), deltas [V, K, D] (theirs) and coefficients; None if not needed.

    d_base = zeros.index_add(0, ids, dy); d_deltas = zeros.index_add(0, ids, c (x) dy)
    d_c[s, k] = sum of <dy_m, deltas[ids_m, k]> over the positions m of weighting s

    d_deltas is added to `main_grad` [V, K, D] where that is given, and not returned.
    """
    V, K, D = deltas_VKD.shape
    accumulator = torch.promote_types(dy_MD.dtype, torch.float32)
    wide_dy_MD = dy_MD.to(accumulator)
    d_base = d_deltas = d_c = None
    if needs_base:
        d_base = torch.ops.aten.embedding_dense_backward(wide_dy_MD, ids_M, V, padding_idx, False).to(dy_MD.dtype)
    if needs_deltas:
        c_MK = c_SK.to(accumulator).index_select(0, row_map_M)
        c_dy = (c_MK[:, :, None] * wide_dy_MD[:, None, :]).flatten(1)
        if main_grad is None:
            d_deltas = torch.ops.aten.embedding_dense_backward(c_dy, ids_M, V, padding_idx, False)
            d_deltas = d_deltas.view(V, K, D).to(deltas_VKD.dtype)
        else:
            kept = ids_M != padding_idx
            main_grad.flatten(1).index_put_((ids_M[kept],), c_dy[kept], accumulate=True)
    if needs_coefficients:
        with torch.autocast(dy_MD.device.type, enabled=False):
            copies_MKD = F.embedding(ids_M, deltas_VKD.flatten(1)).view(-1, K, D).to(accumulator)
            d_c_MK = torch.bmm(copies_MKD, wide_dy_MD[:, :, None]).squeeze(2)
        d_c = sum_by_weighting(d_c_MK, row_map_M, c_SK.shape[0]).to(c_SK.dtype)
    return d_base, d_deltas, d_c


def _mix(
    ids_M: Tensor, base_VD: Tensor | None, deltas_VKD: Tensor, c_SK: Tensor, row_map_M: Tensor, padding_idx: int
) -> Tensor:
    _, K, D = deltas_VKD.shape
    padding = None if padding_idx < 0 else padding_idx
    check_ids(ids_M, deltas_VKD.shape[0])
    dtype = deltas_VKD.dtype if base_VD is None else base_VD.dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    # Built negated and subtracted, with no -0 in it, so that the sign of a base of -0.0 stays: see mixed_linear.
    minus_c_MK = -c_SK.to(accumulator).index_select(0, row_map_M)
    copies_MKD = F.embedding(ids_M, deltas_VKD.flatten(1), padding).view(-1, K, D).to(accumulator)
    minus_y_MD = (minus_c_MK[:, :, None] * copies_MKD).sum(1) + 0.0
    if base_VD is None:
        return (-minus_y_MD).to(dtype)
    return (F.embedding(ids_M, base_VD, padding).to(accumulator) - minus_y_MD).to(dtype)


def check_ids(ids_M: Tensor, V: int) -> None:
    """Raise IndexError for ids on the CPU that are outside [0, V)."""
    # On a GPU the values are unknown here without waiting for it; torch's look-up stops with an assertion there.
    if ids_M.device.type != "cpu" or ids_M.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in ids_M.aminmax())
    if lowest < 0 or highest >= V:
        bad = lowest if lowest < 0 else highest
        raise IndexError(f"ids hold {bad}, outside [0, {V}) of the embedding's rows")
