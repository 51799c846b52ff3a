"""Launchers of the Triton kernels of `low_rank_linear`: back-end "triton".

Shapes: M rows, D in, N out, R ranks (of all adapters together), S distinct weightings, P partial sums.

Every launcher takes strided inputs, copies none of them, reads no value on the host, uses no atomics and gives the same
bits on every run. A row's y and dx do not depend on the values or weightings of its neighbours; the number of rows
chooses tiles and splits, so their bits may differ between batch sizes, unless `batch_invariant` asks for one choice.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import (
    Tile,
    check_tensors,
    choose_tile,
    dot_precision,
    on_device,
    select_product_tile,
    sum_by_weighting,
)
from clp_kernels.low_rank_linear_triton_kernels import expand_kernel, factor_gradient_kernel, shrink_kernel

_PROGRAMS = 128  # enough to fill a GPU; fewer share what is reduced among them
_SPLIT = 512  # elements of what is reduced, below which a split gains nothing


def select_shrink_tile(num_rows: int, num_ranks: int, dtype: torch.dtype) -> Tile:
    """Chooses the tile of the shrink, outs = ranks, from the rows, ranks and dtype of x alone.

    Args:
        num_rows: M, at least 1.
        num_ranks: R, at least 1; a tile takes them all up to 64.
        dtype: Dtype of x.

    Returns:
        The tile; where a launch with it spills registers is in tests/clp_kernels/aot_known.json.
    """
    if num_rows <= 16:
        reduced = 32 if dtype == torch.float32 else 64
        return Tile(rows=16, outs=_rank_block(num_ranks), reduced=reduced, num_warps=4, num_stages=4)
    rows = 32 if num_rows <= 1024 else 64
    return Tile(rows=rows, outs=_rank_block(num_ranks), reduced=32, num_warps=4, num_stages=3)


def select_factor_tile(num_ranks: int) -> Tile:
    """Chooses the tile of a factor's gradient: outs = columns of the factor, reduced = ranks; it sums over the rows."""
    return Tile(rows=32, outs=64, reduced=_rank_block(num_ranks), num_warps=4, num_stages=3)


def _rank_block(num_ranks: int) -> int:
    return min(64, max(16, triton.next_power_of_2(num_ranks)))


def select_splits(num_programs: int, num_reduced: int, block: int) -> tuple[int, int]:
    """Chooses how many programs share one sum, each with a partial sum of its own, where few programs have no sharers.

    Args:
        num_programs: Programs of the launch without a split.
        num_reduced: Elements of the sum.
        block: Elements that a program adds at once.

    Returns:
        The number of splits, and the elements of one, a multiple of `block`; no split is empty.
    """
    wanted = max(1, min(_PROGRAMS // num_programs, num_reduced // _SPLIT))
    size = triton.cdiv(triton.cdiv(num_reduced, wanted), block) * block
    return max(1, triton.cdiv(num_reduced, max(size, 1))), max(size, block)


def forward(
    x_MD: Tensor,
    base_ND: Tensor | None,
    down_RD: Tensor,
    up_NR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    bias_N: Tensor | None,
    keep_shrink: bool,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns y_MN in x's dtype and, if `keep_shrink`, `x @ down.T` [M, R] in float32 (else an empty tensor).

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T

    Accumulated in float32, base and low-rank term together, and rounded once. `batch_invariant`: a row's bits depend on
    nothing but the row, its gates and the weights.

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"x": x_MD, "base": base_ND, "down": down_RD, "up": up_NR, "gates": gates_SR, "bias": bias_N})
    tiles = _choose_tiles("", x_MD, base_ND, down_RD, up_NR, batch_invariant)
    h_PMR = _shrink(x_MD, down_RD, tiles[0], batch_invariant)
    y_MN = _expand(x_MD, base_ND, h_PMR, gates_SR, row_map_M, up_NR, bias_N, tiles[1])
    return y_MN, _added(h_PMR) if keep_shrink else h_PMR.new_empty(0)


def backward(
    dy_MN: Tensor,
    shrink_MR: Tensor,
    x_MD: Tensor,
    base_ND: Tensor | None,
    down_RD: Tensor,
    up_NR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, base, down, up and gates that `needs` asks for, in their dtypes; else None.

    d_up = dy.T @ (shrink * gates); d_ranks = dy @ up; d_gates[s] = sum of d_ranks * shrink over weighting s's rows;
    d_down = (d_ranks * gates).T @ x; dx = dy @ base + (d_ranks * gates) @ down; d_base = dy.T @ x

    Raises:
        ValueError: A dtype or device that the kernels do not take.
    """
    check_tensors({"x": x_MD, "dy": dy_MN, "base": base_ND, "down": down_RD, "up": up_NR, "gates": gates_SR})
    needs_x, needs_base, needs_down, needs_up, needs_gates = needs
    dx_MD = d_base_ND = d_down_RD = d_up_NR = d_gates_SR = None
    if needs_up:
        d_up_NR = _factor_gradient(dy_MN, shrink_MR, gates_SR, row_map_M).to(up_NR.dtype)
    if needs_x or needs_down or needs_gates:
        tiles = _choose_tiles(".dx", dy_MN, base_ND, down_RD, up_NR, batch_invariant)
        d_ranks_MR = _added(_shrink(dy_MN, up_NR.T, tiles[0], batch_invariant))
        if needs_gates:
            terms_MR = d_ranks_MR * shrink_MR
            d_gates_SR = sum_by_weighting(terms_MR[None], row_map_M, gates_SR.shape[0]).to(gates_SR.dtype)
        if needs_down:
            d_down_DR = _factor_gradient(x_MD, d_ranks_MR, gates_SR, row_map_M)
            d_down_RD = d_down_DR.T.contiguous().to(down_RD.dtype)
        if needs_x:
            base_DN = None if base_ND is None else base_ND.T
            weights = (base_DN, d_ranks_MR[None], gates_SR, row_map_M, down_RD.T)
            dx_MD = _expand(dy_MN, *weights, None, tiles[1])
    if needs_base and base_ND is not None:
        # A plain GEMM of torch's; in float32 where the base is wider than the rows.
        dtype = dy_MN.dtype if base_ND.dtype == dy_MN.dtype else torch.float32
        d_base_ND = (dy_MN.T.to(dtype) @ x_MD.to(dtype)).to(base_ND.dtype)
    return dx_MD, d_base_ND, d_down_RD, d_up_NR, d_gates_SR


def _added(partials: Tensor) -> Tensor:
    return partials[0] if len(partials) == 1 else partials.sum(0)


def _choose_tiles(
    of_pass: str, a_MC: Tensor, base_ND: Tensor | None, down_RD: Tensor, up_NR: Tensor, batch_invariant: bool
) -> tuple[Tile, Tile]:
    """Returns the tiles of shrink and expand: what sets the order of a row's sum, batch-invariant one for any M."""
    (R, D), N, M = down_RD.shape, up_NR.shape[0], a_MC.shape[0]
    rows = 1 if batch_invariant else M
    return (
        choose_tile(
            f"low_rank_linear.shrink{of_pass}",
            *(a_MC, None, down_RD, (R, N, D)),
            lambda: select_shrink_tile(rows, R, a_MC.dtype),
            batch_invariant,
        ),
        choose_tile(
            f"low_rank_linear.expand{of_pass}",
            *(a_MC, base_ND, up_NR, (R, N, D)),
            lambda: select_product_tile(M, a_MC.dtype, batch_invariant),
            batch_invariant,
        ),
    )


def _shrink(a_MC: Tensor, w_RC: Tensor, tile: Tile, batch_invariant: bool) -> Tensor:
    """Returns a @ w.T in float32, [P, M, R]: P partial sums over C, at least one."""
    (M, C), R = a_MC.shape, w_RC.shape[0]
    if M == 0 or R == 0:
        return torch.zeros(1, M, R, dtype=torch.float32, device=a_MC.device)
    blocks = triton.cdiv(M, tile.rows), triton.cdiv(R, tile.outs)
    # Batch-invariant, the split is that of one row's block whatever M is.
    P, split_size = select_splits(blocks[1] if batch_invariant else blocks[0] * blocks[1], C, tile.reduced)
    grid = (*blocks, P)
    h_PMR = torch.empty(P, M, R, dtype=torch.float32, device=a_MC.device)
    with on_device(a_MC):
        shrink_kernel[grid](
            *(a_MC, w_RC, h_PMR),
            *(M, R, C, split_size),
            *(*a_MC.stride(), *w_RC.stride()),
            PRECISION=dot_precision(a_MC.dtype, w_RC.dtype),
            BLOCK_M=tile.rows,
            BLOCK_R=tile.outs,
            BLOCK_C=tile.reduced,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return h_PMR


def _expand(
    a_MC: Tensor,
    base_OC: Tensor | None,
    h_PMR: Tensor,
    gates_SR: Tensor,
    row_map_M: Tensor,
    w_OR: Tensor,
    bias_O: Tensor | None,
    tile: Tile,
) -> Tensor:
    """Returns a @ base.T + (gates[row_map] * h.sum(0)) @ w.T + bias in a's dtype."""
    (M, C), (num_outs, R) = a_MC.shape, w_OR.shape
    out_MO = a_MC.new_empty(M, num_outs)
    if out_MO.numel() == 0:
        return out_MO
    base_dtype, base_strides = (a_MC.dtype, (0, 0)) if base_OC is None else (base_OC.dtype, base_OC.stride())
    bias_strides = (0,) if bias_O is None else bias_O.stride()
    with on_device(a_MC):
        expand_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(num_outs, tile.outs))](
            *(a_MC, base_OC, h_PMR, gates_SR, row_map_M, w_OR, bias_O, out_MO),
            *(M, num_outs, C, R, len(h_PMR), h_PMR.stride(0)),
            *(*a_MC.stride(), *base_strides, *gates_SR.stride(), *row_map_M.stride(), *w_OR.stride(), *bias_strides),
            HAS_BASE=base_OC is not None,
            HAS_BIAS=bias_O is not None,
            BASE_PRECISION=dot_precision(a_MC.dtype, base_dtype),
            # The gated shrink is float32 beside 16-bit rows: the rule is that of a float32 weight.
            PRECISION=dot_precision(a_MC.dtype, torch.float32),
            BLOCK_M=tile.rows,
            BLOCK_O=tile.outs,
            BLOCK_C=tile.reduced,
            BLOCK_R=16 if R <= 16 else 32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out_MO


def _factor_gradient(a_MC: Tensor, h_MR: Tensor, gates_SR: Tensor, row_map_M: Tensor) -> Tensor:
    """Returns a.T @ (gates[row_map] * h) in float32, [C, R]."""
    (M, C), R = a_MC.shape, h_MR.shape[1]
    if M == 0 or C == 0 or R == 0:
        return torch.zeros(C, R, dtype=torch.float32, device=a_MC.device)
    tile = select_factor_tile(R)
    blocks = triton.cdiv(C, tile.outs), triton.cdiv(R, tile.reduced)
    P, split_size = select_splits(blocks[0] * blocks[1], M, tile.rows)
    grid = (*blocks, P)
    out_PCR = torch.empty(P, C, R, dtype=torch.float32, device=a_MC.device)
    with on_device(a_MC):
        factor_gradient_kernel[grid](
            *(a_MC, h_MR, gates_SR, row_map_M, out_PCR),
            *(M, R, C, split_size),
            *(*a_MC.stride(), *gates_SR.stride(), *row_map_M.stride()),
            PRECISION=dot_precision(a_MC.dtype, torch.float32),
            BLOCK_M=tile.rows,
            BLOCK_R=tile.reduced,
            BLOCK_C=tile.outs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return _added(out_PCR)
