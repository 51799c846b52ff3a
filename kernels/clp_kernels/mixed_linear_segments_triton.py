"""Launchers of `mixed_linear_segments_triton_kernels`: many 16-bit rows per weighting, where the arithmetic binds.

The deltas are mixed on chip, tile by tile, so K of them cost no more products than one. The gradient of the deltas is
one product per two copies, whatever the number of weightings. Nothing of a weight's size is allocated.

Legend: M rows, D in, N out, K copies, S distinct weightings; R the reduced and O the output dimension of one product.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import Tile, choose_tile, on_device
from clp_kernels.mixed_linear_segments_triton_kernels import (
    run_ends_kernel,
    segment_gradient_kernel,
    segment_product_kernel,
)

AMPERE = (8, 160 * 1024)  # capability and shared memory of a block, where there is no GPU to ask


def multiply(
    a_MR: Tensor,
    base_ND: Tensor | None,
    deltas_NKD: Tensor,
    c_SK: Tensor,
    row_map_M: Tensor,
    bias_N: Tensor | None,
    bias_deltas_NK: Tensor | None,
    *,
    transposed: bool,
    exact_delta: bool,
) -> Tensor:
    """Computes a (base + sum_k c_k delta_k)^T + bias + sum_k c_k bias_delta_k, or without ^T and bias if `transposed`.

    Args:
        a_MR: Rows x, or dy where `transposed`, bfloat16 or float16, any strides.
        base_ND: Frozen weight in a's dtype, or None.
        deltas_NKD: Trained differences, any dtype.
        c_SK: Coefficients.
        row_map_M: int32, row -> weighting, values in [0, S). Rows of one weighting side by side: a tile of 256 rows
            costs as much again for each further weighting in it.
        bias_N: Bias, or None.
        bias_deltas_NK: Trained differences of the bias, or None.
        transposed: Whether the product is with the weight itself: the gradient to x.
        exact_delta: False rounds base and deltas as one 16-bit weight, at half the products.

    Returns:
        [M, N], or [M, D] where `transposed`, in a's dtype; accumulated in float32, rounded once.
    """
    N, K, D = deltas_NKD.shape
    num_outs, num_reduced = (D, N) if transposed else (N, D)
    out_MO = a_MR.new_empty(a_MR.shape[0], num_outs)
    if out_MO.numel() == 0:
        return out_MO
    stride_n, stride_k, stride_d = deltas_NKD.stride()
    base_strides = (0, 0) if base_ND is None else base_ND.stride()
    deltas_strides = (stride_n, stride_k, stride_d)
    if transposed:
        base_strides, deltas_strides = base_strides[::-1], deltas_strides[::-1]
    bias_strides = (
        *((0,) if bias_N is None else bias_N.stride()),
        *((0, 0) if bias_deltas_NK is None else bias_deltas_NK.stride()),
    )
    tile = choose_tile(
        "mixed_linear.segments.dx" if transposed else "mixed_linear.segments",
        *(a_MR, base_ND, deltas_NKD, (K, N, D)),
        lambda: select_segment_tile(K + (base_ND is not None), deltas_NKD.dtype, *device_limits(a_MR.device)),
    )
    grid = (triton.cdiv(a_MR.shape[0], tile.rows) * triton.cdiv(num_outs, tile.outs),)
    with on_device(a_MR):
        segment_product_kernel[grid](
            *(a_MR, base_ND, deltas_NKD, c_SK, row_map_M, bias_N, bias_deltas_NK, out_MO),
            *(a_MR.shape[0], num_outs, num_reduced),
            *(*a_MR.stride(), *base_strides, *deltas_strides),
            *(*c_SK.stride(), *row_map_M.stride(), *bias_strides),
            K=K,
            HAS_BASE=base_ND is not None,
            HAS_BIAS=bias_N is not None,
            HAS_BIAS_DELTAS=bias_deltas_NK is not None,
            EXACT=exact_delta,
            GROUP=8,
            **_blocks(tile),
        )
    return out_MO


def select_segment_tile(num_streams: int, deltas: torch.dtype, capability: int, shared_bytes: int) -> Tile:
    """Chooses the tile of `segment_product_kernel`: as many stages as the shared memory holds.

    On an H200 at N = D = M = 4096, K = 2, S = 8: 32 deep 543 us, 64 deep 700; 128 rows 697; 64 outputs 584. With
    256 rows float32 deltas spill, and before Hopper, where the left operand takes registers too, all do. On Blackwell
    256 rows want 528 columns of tensor memory, of 512.
    """
    outs, rows, reduced = 128, 256 if capability == 9 and deltas.itemsize == 2 else 128, 32
    stage_bytes = reduced * (outs * num_streams * deltas.itemsize + rows * 2)
    stages = max(1, min(4, shared_bytes // stage_bytes))
    return Tile(rows=rows, outs=outs, reduced=reduced, num_warps=8, num_stages=stages)


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Returns the major capability of a GPU and the bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return AMPERE
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.shared_memory_per_block_optin - 4096  # type: ignore[attr-defined]


def write_gradient(
    dy_MN: Tensor, x_MD: Tensor, c_SK: Tensor, row_map_M: Tensor, out_NKD: Tensor, *, adds: bool
) -> None:
    """Stores d_deltas = sum_s c_s (dy_s^T x_s) in a contiguous out_NKD, or adds it: float32 sums, rounded once.

    Rows of one weighting side by side: a run of them takes whole steps, of 64 rows unless a table says otherwise.
    """
    N, K, D = out_NKD.shape
    M = x_MD.shape[0]
    run_ends_M = row_map_M.new_empty(M)
    heuristic = Tile(rows=64, outs=128, reduced=128, num_warps=8, num_stages=4)
    tile = choose_tile("mixed_linear.segments.d_deltas", x_MD, None, out_NKD, (K, N, D), lambda: heuristic)
    with on_device(x_MD):
        run_ends_kernel[(triton.cdiv(M, 256),)](row_map_M, run_ends_M, M, *row_map_M.stride(), BLOCK_M=256)
        segment_gradient_kernel[(triton.cdiv(N, tile.outs) * triton.cdiv(D, tile.reduced), triton.cdiv(K, 2))](
            *(dy_MN, x_MD, c_SK, row_map_M, run_ends_M, out_NKD),
            *(M, N, D, K),
            *(*dy_MN.stride(), *x_MD.stride(), *c_SK.stride(), *row_map_M.stride()),
            HAS_SECOND=K > 1,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outs,
            BLOCK_D=tile.reduced,
            GROUP=8,
            ADDS=adds,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _blocks(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.outs,
        "BLOCK_R": tile.reduced,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
