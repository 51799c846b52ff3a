"""Triton kernels of `low_rank_linear`: the shrink, the expand on top of the base product, the gradient of a factor.

Legend: M rows, R ranks, S distinct weightings, P partial sums; C the reduced and O the output dimension of one product
(forward: C = D, O = N; gradient to x: C = N, O = D). Names: `o_` offsets, `m_` masks, `p_` pointers, `b_` values.

The shrink h = a @ w.T stays float32 and ungated: the gate multiplies it where it is read. So one [M, R] tensor serves
the expand and the backward, and both products are the same two kernels in the two directions.

Rounding: that of `mixed_linear_triton_kernels`. The base product and the expand run into one float32 accumulator.
"""

import triton
import triton.language as tl

from clp_kernels.mixed_linear_triton_kernels import multiply_add, stream_product


@triton.jit
def _gated(
    p_h_MR,
    gates_ptr,
    b_weighting_M,
    o_ranks_R,
    m_tile_MR,
    num_partials,
    stride_partial,
    stride_gates_s,
    stride_gates_r,
):
    """Returns a tile of the shrink, its partial sums added in order, times each row's own gates."""
    b_h = tl.load(p_h_MR, mask=m_tile_MR, other=0.0)
    for _ in range(1, num_partials):
        p_h_MR += stride_partial
        b_h += tl.load(p_h_MR, mask=m_tile_MR, other=0.0)
    p_gates = gates_ptr + b_weighting_M[:, None] * stride_gates_s + o_ranks_R[None, :] * stride_gates_r
    return b_h * tl.load(p_gates, mask=m_tile_MR, other=0.0)


@triton.jit
def shrink_kernel(
    a_ptr,
    w_ptr,
    h_ptr,
    num_rows,
    num_ranks,
    num_reduced,
    split_size,
    stride_a_m,
    stride_a_c,
    stride_w_r,
    stride_w_c,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes a tile of h[i, m, r] = the i-th split of sum_c a[m, c] w[r, c], in float32.

    Assumes a contiguous h [P, M, R].
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_split = tl.program_id(2).to(tl.int64)
    start_c = i_split * split_size
    m_rows = o_rows < num_rows
    m_ranks = o_ranks < num_ranks
    o_rows = o_rows.to(tl.int64)
    o_ranks = o_ranks.to(tl.int64)
    b_h = stream_product(
        a_ptr + o_rows[:, None] * stride_a_m + start_c * stride_a_c,
        w_ptr + o_ranks[None, :] * stride_w_r + start_c * stride_w_c,
        m_rows[:, None],
        m_ranks[None, :],
        tl.minimum(split_size, num_reduced - start_c).to(tl.int32),
        stride_a_c,
        stride_w_c,
        PRECISION,
        BLOCK_M,
        BLOCK_R,
        BLOCK_C,
    )
    p_h = h_ptr + (i_split * num_rows + o_rows[:, None]) * num_ranks + o_ranks[None, :]
    tl.store(p_h, b_h, mask=m_rows[:, None] & m_ranks[None, :])


@triton.jit
def expand_kernel(
    a_ptr,
    base_ptr,
    h_ptr,
    gates_ptr,
    row_map_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outs,
    num_reduced,
    num_ranks,
    num_partials,
    stride_partial,
    stride_a_m,
    stride_a_c,
    stride_base_o,
    stride_base_c,
    stride_gates_s,
    stride_gates_r,
    stride_map,
    stride_w_o,
    stride_w_r,
    stride_bias,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes a tile of out[m, o] = sum_c a[m, c] base[o, c] + sum_r gate[m, r] h[m, r] w[o, r] + bias[o].

    Assumes row_map values in [0, S) and contiguous h [P, M, R] and out [M, O].
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_outs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_rows = o_rows < num_rows
    m_outs = o_outs < num_outs
    o_rows = o_rows.to(tl.int64)
    o_outs = o_outs.to(tl.int64)

    b_out = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    if HAS_BASE:
        b_out = stream_product(
            a_ptr + o_rows[:, None] * stride_a_m,
            base_ptr + o_outs[None, :] * stride_base_o,
            m_rows[:, None],
            m_outs[None, :],
            num_reduced,
            stride_a_c,
            stride_base_c,
            BASE_PRECISION,
            BLOCK_M,
            BLOCK_O,
            BLOCK_C,
        )
    b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
    for start_r in range(0, num_ranks, BLOCK_R):
        o_ranks = start_r + tl.arange(0, BLOCK_R)
        m_ranks = o_ranks < num_ranks
        o_ranks = o_ranks.to(tl.int64)
        b_h = _gated(
            h_ptr + o_rows[:, None] * num_ranks + o_ranks[None, :],
            gates_ptr,
            b_weighting,
            o_ranks,
            m_rows[:, None] & m_ranks[None, :],
            num_partials,
            stride_partial,
            stride_gates_s,
            stride_gates_r,
        )
        p_w = w_ptr + o_ranks[:, None] * stride_w_r + o_outs[None, :] * stride_w_o
        b_w = tl.load(p_w, mask=m_ranks[:, None] & m_outs[None, :], other=0.0)
        b_out = multiply_add(b_h, b_w, b_out, PRECISION)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_outs * stride_bias, mask=m_outs, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_rows[:, None] * num_outs + o_outs[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_rows[:, None] & m_outs[None, :])


@triton.jit
def factor_gradient_kernel(
    a_ptr,
    h_ptr,
    gates_ptr,
    row_map_ptr,
    out_ptr,
    num_rows,
    num_ranks,
    num_columns,
    split_size,
    stride_a_m,
    stride_a_c,
    stride_gates_s,
    stride_gates_r,
    stride_map,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes a tile of out[i, c, r] = the i-th split of sum_m a[m, c] gate[m, r] h[m, r], in float32, rows in order.

    Assumes row_map values in [0, S) and contiguous h [M, R] and out [P, C, R].
    """
    o_columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_split = tl.program_id(2)
    m_columns = o_columns < num_columns
    m_ranks = o_ranks < num_ranks
    o_columns = o_columns.to(tl.int64)
    o_ranks = o_ranks.to(tl.int64)

    b_out = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    start_m = i_split * split_size
    for start in range(start_m, tl.minimum(start_m + split_size, num_rows), BLOCK_M):
        o_rows = start + tl.arange(0, BLOCK_M)
        m_rows = o_rows < num_rows
        o_rows = o_rows.to(tl.int64)
        p_a = a_ptr + o_columns[:, None] * stride_a_c + o_rows[None, :] * stride_a_m
        b_a = tl.load(p_a, mask=m_columns[:, None] & m_rows[None, :], other=0.0)
        b_h = _gated(
            h_ptr + o_rows[:, None] * num_ranks + o_ranks[None, :],
            gates_ptr,
            tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64),
            o_ranks,
            m_rows[:, None] & m_ranks[None, :],
            1,
            0,
            stride_gates_s,
            stride_gates_r,
        )
        b_out = multiply_add(b_a, b_h, b_out, PRECISION)
    p_out = out_ptr + (i_split.to(tl.int64) * num_columns + o_columns[:, None]) * num_ranks + o_ranks[None, :]
    tl.store(p_out, b_out, mask=m_columns[:, None] & m_ranks[None, :])
