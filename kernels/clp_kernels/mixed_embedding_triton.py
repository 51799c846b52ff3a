"""Launchers of the Triton kernels of `mixed_embedding`: back-end "triton".

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.

Every launcher takes strided inputs, copies none of them, reads no value on the host of a GPU's, uses no atomics and
gives the same bits on every run. A position's y depends on its own id and coefficients alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import Tile, check_tensors, choose_tile, on_device, sum_by_weighting
from clp_kernels.mixed_embedding_reference import check_ids
from clp_kernels.mixed_embedding_triton_kernels import (
    coefficient_terms_kernel,
    mixed_embedding_kernel,
    position_sum_kernel,
)


def select_blocks(num_ins: int) -> tuple[int, int]:
    """Chooses the positions and the elements of a row that a program holds, from D alone: BLOCK_M, BLOCK_D."""
    block_d = min(512, max(64, triton.next_power_of_2(num_ins)))
    return 2048 // block_d, block_d


def select_lookup_tile(num_ins: int) -> Tile:
    """Chooses the tile of the lookup: the blocks of `select_blocks`."""
    block_m, block_d = select_blocks(num_ins)
    return Tile(rows=block_m, reduced=block_d, num_warps=4)


def forward(ids_M: Tensor, base_VD: Tensor | None, deltas_VKD: Tensor, c_SK: Tensor, row_map_M: Tensor) -> Tensor:
    """Returns y_MD in the base's dtype, in the deltas' where base is None.

    y = F.embedding(ids, base) + einsum("mk,mkd->md", c, F.embedding(ids, deltas.flatten(1)).unflatten(1, (K, D)))

    A copy whose coefficient is 0 is not read.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
        IndexError: An id outside [0, V), on the CPU; on a GPU that is an assertion of the kernel's.
    """
    check_tensors({"deltas": deltas_VKD, "base": base_VD})
    V, K, D = deltas_VKD.shape
    check_ids(ids_M, V)
    M = ids_M.shape[0]
    y_MD = (deltas_VKD if base_VD is None else base_VD).new_empty(M, D)
    if y_MD.numel() == 0:
        return y_MD
    base_strides = (0, 0) if base_VD is None else base_VD.stride()
    tile = choose_tile("mixed_embedding", y_MD, base_VD, deltas_VKD, (K, V, D), lambda: select_lookup_tile(D))
    with on_device(deltas_VKD):
        mixed_embedding_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(D, tile.reduced))](
            *(ids_M, base_VD, deltas_VKD, c_SK, row_map_M, y_MD),
            *(M, D, K, V),
            *(*ids_M.stride(), *base_strides, *deltas_VKD.stride(), *c_SK.stride(), *row_map_M.stride()),
            HAS_BASE=base_VD is not None,
            BLOCK_M=tile.rows,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
            sanitize_overflow=False,  # of the arithmetic on offsets, which debug would check too
        )
    return y_MD


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
    """Returns the gradients of base [V, D] (dy's dtype), deltas [V, K, D] (theirs), coefficients; None if not needed.

    d_base = zeros.index_add(0, ids, dy); d_deltas = zeros.index_add(0, ids, c (x) dy)
    d_c[s, k] = sum of <dy_m, deltas[ids_m, k]> over the positions m of weighting s

    d_deltas is added to `main_grad` [V, K, D] float32 where that is given, and not returned: rows of ids that do not
    occur are then not touched.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"dy": dy_MD, "deltas": deltas_VKD})
    V, K, D = deltas_VKD.shape
    d_base_VD = d_deltas_VKD = d_c_SK = None
    if needs_base or needs_deltas:
        runs = _runs_of_equal_ids(ids_M)
    if needs_base:
        d_base_VD = dy_MD.new_zeros(V, D)
        _add_positions(dy_MD, runs, None, row_map_M, padding_idx, d_base_VD[:, None], adds=False)
    if needs_deltas and main_grad is not None:
        _add_positions(dy_MD, runs, c_SK, row_map_M, padding_idx, main_grad, adds=True)
    elif needs_deltas:
        d_deltas_VKD = deltas_VKD.new_zeros(V, K, D)
        _add_positions(dy_MD, runs, c_SK, row_map_M, padding_idx, d_deltas_VKD, adds=False)
    if needs_coefficients:
        terms_MK = _coefficient_terms(dy_MD, ids_M, deltas_VKD)
        d_c_SK = sum_by_weighting(terms_MK[None], row_map_M, c_SK.shape[0]).to(c_SK.dtype)
    return d_base_VD, d_deltas_VKD, d_c_SK


def _runs_of_equal_ids(ids_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the ids in ascending order, the position of each, and the end of the run of equal ids it stands in."""
    sorted_ids_M, order_M = ids_M.sort(stable=True)
    return sorted_ids_M, order_M, torch.searchsorted(sorted_ids_M, sorted_ids_M, right=True)


def _add_positions(
    dy_MD: Tensor,
    runs: tuple[Tensor, Tensor, Tensor],
    c_SK: Tensor | None,
    row_map_M: Tensor,
    padding_idx: int,
    out_VKD: Tensor,
    *,
    adds: bool,
) -> None:
    """Writes each id's sum of c (x) dy over its positions (of dy where c is None), or adds it to what is there."""
    (M, D), K = dy_MD.shape, out_VKD.shape[1]
    if M == 0 or out_VKD.numel() == 0:
        return
    block_m, block_d = select_blocks(D)
    with on_device(dy_MD):
        position_sum_kernel[(M, triton.cdiv(D, block_d), K)](
            *(dy_MD, *runs, c_SK, row_map_M, out_VKD),
            *(D, K, padding_idx),
            *(*dy_MD.stride(), *((0, 0) if c_SK is None else c_SK.stride()), *row_map_M.stride()),
            HAS_COEFFICIENTS=c_SK is not None,
            ADDS=adds,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
        )


def _coefficient_terms(dy_MD: Tensor, ids_M: Tensor, deltas_VKD: Tensor) -> Tensor:
    """Returns <dy_m, deltas[ids_m, k]> for each position and copy, [M, K] float32."""
    (M, D), K = dy_MD.shape, deltas_VKD.shape[1]
    terms_MK = torch.empty(M, K, dtype=torch.float32, device=dy_MD.device)
    if terms_MK.numel() == 0:
        return terms_MK
    block_m, block_d = select_blocks(D)
    with on_device(dy_MD):
        coefficient_terms_kernel[(triton.cdiv(M, block_m), K)](
            *(dy_MD, ids_M, deltas_VKD, terms_MK),
            *(M, D, K),
            *(*dy_MD.stride(), *ids_M.stride(), *deltas_VKD.stride()),
            BLOCK_M=block_m,
            BLOCK_D=block_d,
        )
    return terms_MK
