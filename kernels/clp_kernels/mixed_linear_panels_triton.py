"""`mixed_linear` on the GPU where all rows have one weighting and the mix may be rounded: panels of it, by cuBLAS.

A panel of the mixed weight is formed by one kernel in at most PANEL_BYTES, which the L2 cache holds, and multiplied by
torch's GEMM. The gradient of the deltas is one float32 product, panel by panel, scaled into the K copies.

Legend: M rows, D in, N out, K copies. Names: `o_` offsets, `m_` masks, `p_` pointers, `b_` values.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from clp_kernels.launch_triton import INTERPRETED, Tile, choose_tile, on_device
from clp_kernels.mixed_linear_segments_triton_kernels import store_or_add

PANEL_BYTES = 32 * 2**20


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

    The mix is formed in float32 and rounded once, to a's dtype; so is the mixed bias.

    Args:
        a_MR: Rows x, or dy where `transposed`, in one of the three dtypes.
        base_ND: Frozen weight in a's dtype, or None.
        deltas_NKD: Trained differences.
        c_SK: Coefficients of the one weighting, [1, K].
        row_map_M: Not read: all rows have weighting 0.
        bias_N: Bias, or None.
        bias_deltas_NK: Trained differences of the bias, or None.
        transposed: Whether the product is with the weight itself: the gradient to x.
        exact_delta: Not read: for 16-bit rows it must be False (`select_form`).

    Returns:
        [M, N], or [M, D] where `transposed`, in a's dtype.
    """
    N, K, D = deltas_NKD.shape
    num_outs, num_reduced = (D, N) if transposed else (N, D)
    out_MO = a_MR.new_empty(a_MR.shape[0], num_outs)
    if out_MO.numel() == 0:
        return out_MO
    bias_N = _mix_bias(bias_N, bias_deltas_NK, c_SK[0], a_MR.dtype)
    height = max(1, PANEL_BYTES // (num_reduced * a_MR.element_size()))
    panel = a_MR.new_empty(min(num_outs, height) * num_reduced)
    kernel = "mixed_linear.panels.dx" if transposed else "mixed_linear.panels"
    width = min(num_outs, height) if transposed else D
    tile = choose_tile(kernel, a_MR, base_ND, deltas_NKD, (K, N, D), lambda: select_mix_tile(width))
    for start, end in pairwise([*range(0, num_outs, height), num_outs]):
        outs = slice(start, end)
        where = (slice(None), outs) if transposed else (outs, slice(None))
        deltas = deltas_NKD[:, :, outs] if transposed else deltas_NKD[outs]
        mix = panel[: (end - start) * num_reduced].view(deltas.shape[0], deltas.shape[2])
        _mix_panel(deltas, None if base_ND is None else base_ND[where], c_SK[0], mix, tile)
        if bias_N is None:
            torch.mm(a_MR, mix if transposed else mix.T, out=out_MO[:, outs])
        else:
            torch.addmm(bias_N[outs], a_MR, mix.T, out=out_MO[:, outs])
    return out_MO


def select_mix_tile(num_ins: int) -> Tile:
    """Chooses the elements of a panel's row that a program mixes, and its warps: a thread has 8 of them."""
    block = min(2048, triton.next_power_of_2(num_ins))
    return Tile(reduced=block, num_warps=max(1, min(8, block // 256)))


def write_gradient(
    dy_MN: Tensor, x_MD: Tensor, c_SK: Tensor, row_map_M: Tensor, out_NKD: Tensor, *, adds: bool
) -> None:
    """Stores d_deltas[n, k, d] = c_k (dy^T x)[n, d] in a contiguous out_NKD, or adds it: float32 sums, rounded once."""
    N, K, D = out_NKD.shape
    height = max(1, PANEL_BYTES // (4 * D))
    block = min(1024, triton.next_power_of_2(D))
    panel = x_MD.new_empty(min(N, height), D, dtype=torch.float32)
    for start, end in pairwise([*range(0, N, height), N]):
        gradient = panel[: end - start]
        _write_float32_product(dy_MN[:, start:end].T, x_MD, gradient)
        with on_device(x_MD):
            scale_into_copies_kernel[(end - start, triton.cdiv(D, block))](
                *(gradient, c_SK, out_NKD[start:end], D, c_SK.stride(1)),
                K=K,
                BLOCK_D=block,
                ADDS=adds,
                num_warps=4,
            )


def _mix_bias(bias_N: Tensor | None, bias_deltas_NK: Tensor | None, c_K: Tensor, dtype: torch.dtype) -> Tensor | None:
    if bias_deltas_NK is not None:
        mixed = (bias_deltas_NK.float() * c_K.float()).sum(1)
        return (mixed if bias_N is None else bias_N.float() + mixed).to(dtype)
    return None if bias_N is None else bias_N.to(dtype)


def _mix_panel(deltas_NKD: Tensor, base_ND: Tensor | None, c_K: Tensor, panel_ND: Tensor, tile: Tile) -> None:
    N, K, D = deltas_NKD.shape
    base_strides = (0, 0) if base_ND is None else base_ND.stride()
    with on_device(deltas_NKD):
        mix_panel_kernel[(N, triton.cdiv(D, tile.reduced))](
            *(deltas_NKD, base_ND, c_K, panel_ND, D),
            *(*deltas_NKD.stride(), *base_strides, *c_K.stride()),
            K=K,
            HAS_BASE=base_ND is not None,
            BLOCK_D=tile.reduced,
            num_warps=tile.num_warps,
        )


def _write_float32_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Stores a @ b, accumulated and stored in float32 whatever the operands' dtype."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif INTERPRETED:  # torch's CPU product has no out_dtype
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@triton.jit
def mix_panel_kernel(
    deltas_ptr,
    base_ptr,
    coefficients_ptr,
    panel_ptr,
    num_ins,
    stride_deltas_n,
    stride_deltas_k,
    stride_deltas_d,
    stride_base_n,
    stride_base_d,
    stride_c_k,
    K: tl.constexpr,
    HAS_BASE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores one weighting's mix [+ base] of a panel: float32 sums, rounded once, panel contiguous."""
    row = tl.program_id(0).to(tl.int64)
    o_ins = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_ins = o_ins < num_ins
    o_ins = o_ins.to(tl.int64)
    b_mix = tl.zeros((BLOCK_D,), dtype=tl.float32)
    p_delta = deltas_ptr + row * stride_deltas_n + o_ins * stride_deltas_d
    for k in tl.static_range(K):
        b_c = tl.load(coefficients_ptr + k * stride_c_k).to(tl.float32)
        b_mix += b_c * tl.load(p_delta + k * stride_deltas_k, mask=m_ins, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
    if HAS_BASE:
        p_base = base_ptr + row * stride_base_n + o_ins * stride_base_d
        b_mix += tl.load(p_base, mask=m_ins, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(panel_ptr + row * num_ins + o_ins, b_mix.to(panel_ptr.dtype.element_ty), mask=m_ins)


@triton.jit
def scale_into_copies_kernel(
    gradient_ptr,
    coefficients_ptr,
    d_deltas_ptr,
    num_ins,
    stride_c_k,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Stores d_deltas[n, k, d] = c[k] G[n, d] for one weighting, or adds it: G float32, both contiguous."""
    row = tl.program_id(0).to(tl.int64)
    o_ins = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_ins = o_ins < num_ins
    b_gradient = tl.load(gradient_ptr + row * num_ins + o_ins, mask=m_ins, other=0.0)
    for k in tl.static_range(K):
        b_c = tl.load(coefficients_ptr + k * stride_c_k).to(tl.float32)
        p_out = d_deltas_ptr + (row * K + k) * num_ins + o_ins
        store_or_add(p_out, b_c * b_gradient, m_ins, d_deltas_ptr.dtype.element_ty, ADDS)
