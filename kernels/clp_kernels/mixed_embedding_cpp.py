"""mixed_embedding on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(ids_M: Tensor, base_VD: Tensor | None, deltas_VKD: Tensor, c_SK: Tensor, row_map_M: Tensor) -> Tensor:
    """Return y_MD in the base's dtype, in the deltas' where base is None.

    y = F.embedding(ids, base) + einsum("mk,mkd->md", c, F.embedding(ids, deltas.flatten(1)).unflatten(1, (K, D)))
    """
    return torch.ops.clp.mixed_embedding_cpu_fwd(ids_M, base_VD, deltas_VKD, c_SK, row_map_M)


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

    d_deltas is added to `main_grad` [V, K, D] float32 where that is given, and not returned: rows of ids that do not
    occur are then not touched.
    """
    d_base, d_deltas, d_c = torch.ops.clp.mixed_embedding_cpu_backward(
        dy_MD, ids_M, deltas_VKD, c_SK, row_map_M, padding_idx, needs_base, needs_deltas, needs_coefficients, main_grad
    )
    returns_deltas = needs_deltas and main_grad is None
    return d_base if needs_base else None, d_deltas if returns_deltas else None, d_c if needs_coefficients else None
