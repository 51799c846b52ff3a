"""Triton kernels of `mixed_linear`: the product, its two transposes and the per-row coefficient gradient.

Legend: M rows, D in, N out, K copies, S distinct weightings; R the reduced and O the output dimension of one product
(forward: R = D, O = N; input gradient: R = N, O = D). Names: `o_` offsets, `m_` masks, `p_` pointers, `b_` values.

Every program keeps one float32 accumulator for the stream that it reads (the base, then each copy) and adds it, times
the row's own coefficient, to a float32 sum. So a tile may hold any mixture of weightings, the mix of weights is never
formed and never rounded, and a row's bits do not depend on its neighbours. Coefficients are gathered on the device.

Rounding: operands of one dtype enter the tensor cores as they are; operands of two dtypes (a float32 delta beside a
16-bit row) are multiplied in TF32, where the 16-bit operand is exact and the float32 one keeps 11 significant bits
(bfloat16 would keep 8). float32 operands are multiplied in IEEE float32 unless the caller allows TF32.
"""

import triton
import triton.language as tl


@triton.jit
def multiply_add(b_a, b_w, b_acc, PRECISION: tl.constexpr):
    """Returns b_acc + b_a @ b_w in float32; operands of two dtypes are widened to float32 first."""
    if b_a.dtype != b_w.dtype:
        b_a = b_a.to(tl.float32)
        b_w = b_w.to(tl.float32)
    return tl.dot(b_a, b_w, acc=b_acc, input_precision=PRECISION)


@triton.jit
def stream_product(
    p_a_M1,
    p_w_1O,
    m_rows_M1,
    m_outs_1O,
    num_reduced,
    stride_a_r,
    stride_w_r,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns one stream's a_MR @ w_RO tile in float32, walking R in order. Pointers start at the tile's first R."""
    b_acc = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start_r in range(0, num_reduced, BLOCK_R):
        o_reduced = start_r + tl.arange(0, BLOCK_R)
        m_reduced = o_reduced < num_reduced
        o_reduced = o_reduced.to(tl.int64)
        b_a = tl.load(p_a_M1 + o_reduced[None, :] * stride_a_r, mask=m_rows_M1 & m_reduced[None, :], other=0.0)
        b_w = tl.load(p_w_1O + o_reduced[:, None] * stride_w_r, mask=m_reduced[:, None] & m_outs_1O, other=0.0)
        b_acc = multiply_add(b_a, b_w, b_acc, PRECISION)
    return b_acc


@triton.jit
def mixed_product_tile(
    a_ptr,
    base_ptr,
    deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    bias_ptr,
    bias_deltas_ptr,
    o_rows,
    m_rows,
    o_outs,
    m_outs,
    num_reduced,
    num_copies,
    stride_a_m,
    stride_a_r,
    stride_base_o,
    stride_base_r,
    stride_deltas_o,
    stride_deltas_k,
    stride_deltas_r,
    stride_c_s,
    stride_c_k,
    stride_map,
    stride_bias,
    stride_bias_deltas_n,
    stride_bias_deltas_k,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns a float32 tile of a_MR (base + sum_k c_k delta_k)_RO + bias + sum_k c_k bias_delta_k.

    Offsets are int64. Rows outside `m_rows` are taken as zero. Assumes row_map values in [0, S).
    """
    p_a = a_ptr + o_rows[:, None] * stride_a_m
    b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
    p_c = coefficients_ptr + b_weighting * stride_c_s

    b_out = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    if HAS_BASE:
        p_base = base_ptr + o_outs[None, :] * stride_base_o
        b_out = stream_product(
            p_a,
            p_base,
            m_rows[:, None],
            m_outs[None, :],
            num_reduced,
            stride_a_r,
            stride_base_r,
            BASE_PRECISION,
            BLOCK_M,
            BLOCK_O,
            BLOCK_R,
        )
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_outs * stride_bias, mask=m_outs, other=0.0).to(tl.float32)[None, :]
    p_delta = deltas_ptr + o_outs[None, :] * stride_deltas_o
    if HAS_BIAS_DELTAS:
        p_bias_delta = bias_deltas_ptr + o_outs * stride_bias_deltas_n
    for _ in range(num_copies):
        b_stream = stream_product(
            p_a,
            p_delta,
            m_rows[:, None],
            m_outs[None, :],
            num_reduced,
            stride_a_r,
            stride_deltas_r,
            DELTAS_PRECISION,
            BLOCK_M,
            BLOCK_O,
            BLOCK_R,
        )
        if HAS_BIAS_DELTAS:
            b_stream += tl.load(p_bias_delta, mask=m_outs, other=0.0).to(tl.float32)[None, :]
            p_bias_delta += stride_bias_deltas_k
        b_c = tl.load(p_c, mask=m_rows, other=0.0).to(tl.float32)
        b_out += b_c[:, None] * b_stream
        p_delta += stride_deltas_k
        p_c += stride_c_k
    return b_out


@triton.jit
def mixed_product_kernel(
    a_ptr,
    base_ptr,
    deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    bias_ptr,
    bias_deltas_ptr,
    out_ptr,
    num_rows,
    num_outs,
    num_reduced,
    num_copies,
    stride_a_m,
    stride_a_r,
    stride_base_o,
    stride_base_r,
    stride_deltas_o,
    stride_deltas_k,
    stride_deltas_r,
    stride_c_s,
    stride_c_k,
    stride_map,
    stride_bias,
    stride_bias_deltas_n,
    stride_bias_deltas_k,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Stores the tile of `mixed_product_tile` in out_MO, or adds it to what is there.

    Assumes a contiguous out_MO; everything else comes with its strides.
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_outs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_rows = o_rows < num_rows
    m_outs = o_outs < num_outs
    o_rows = o_rows.to(tl.int64)
    o_outs = o_outs.to(tl.int64)
    b_out = mixed_product_tile(
        a_ptr, base_ptr, deltas_ptr, coefficients_ptr, row_map_ptr, bias_ptr, bias_deltas_ptr,
        o_rows, m_rows, o_outs, m_outs, num_reduced, num_copies,
        stride_a_m, stride_a_r, stride_base_o, stride_base_r, stride_deltas_o, stride_deltas_k, stride_deltas_r,
        stride_c_s, stride_c_k, stride_map, stride_bias, stride_bias_deltas_n, stride_bias_deltas_k,
        HAS_BASE, HAS_BIAS, HAS_BIAS_DELTAS, BASE_PRECISION, DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
    )  # fmt: skip
    p_out = out_ptr + o_rows[:, None] * num_outs + o_outs[None, :]
    m_out = m_rows[:, None] & m_outs[None, :]
    if ADDS:
        b_out += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def deltas_gradient_kernel(
    dy_ptr,
    x_ptr,
    coefficients_ptr,
    row_map_ptr,
    d_deltas_ptr,
    num_rows,
    num_outs,
    num_ins,
    num_copies,
    stride_dy_m,
    stride_dy_n,
    stride_x_m,
    stride_x_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Computes a tile of d_deltas[n, k, d] = sum_m (c[m, k] dy[m, n]) x[m, d], walking the rows in order.

    It is stored, or added to what is there. The product c dy stays float32 (x keeps its dtype and is widened), so a
    16-bit run loses nothing before the dot.
    Assumes row_map values in [0, S) and a contiguous d_deltas [N, K, D].
    """
    o_outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_ins = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(2).to(tl.int64)
    m_outs = o_outs < num_outs
    m_ins = o_ins < num_ins
    o_outs = o_outs.to(tl.int64)
    o_ins = o_ins.to(tl.int64)

    b_acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start_m in range(0, num_rows, BLOCK_M):
        o_rows = start_m + tl.arange(0, BLOCK_M)
        m_rows = o_rows < num_rows
        o_rows = o_rows.to(tl.int64)
        b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
        b_c = tl.load(coefficients_ptr + b_weighting * stride_c_s + k * stride_c_k, mask=m_rows, other=0.0)
        p_dy = dy_ptr + o_outs[:, None] * stride_dy_n + o_rows[None, :] * stride_dy_m
        b_dy = tl.load(p_dy, mask=m_outs[:, None] & m_rows[None, :], other=0.0)
        p_x = x_ptr + o_rows[:, None] * stride_x_m + o_ins[None, :] * stride_x_d
        b_x = tl.load(p_x, mask=m_rows[:, None] & m_ins[None, :], other=0.0)
        b_scaled = b_dy.to(tl.float32) * b_c.to(tl.float32)[None, :]
        b_acc = multiply_add(b_scaled, b_x, b_acc, PRECISION)
    p_out = d_deltas_ptr + (o_outs[:, None] * num_copies + k) * num_ins + o_ins[None, :]
    m_out = m_outs[:, None] & m_ins[None, :]
    if ADDS:
        b_acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_acc.to(d_deltas_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def row_coefficients_gradient_kernel(
    dy_ptr,
    x_ptr,
    deltas_ptr,
    partial_ptr,
    num_rows,
    num_outs,
    num_ins,
    num_copies,
    stride_dy_m,
    stride_dy_n,
    stride_x_m,
    stride_x_d,
    stride_deltas_n,
    stride_deltas_k,
    stride_deltas_d,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes partial[i, m, k] = sum over the i-th block of n of dy[m, n] (x delta_k^T)[m, n], all in float32.

    Each program owns its block of n and its copy, so the sum over i, taken afterwards in order, needs no atomics.
    Assumes a contiguous partial [cdiv(N, BLOCK_N), M, K].
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_outs = tl.program_id(1)
    o_outs = i_outs * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2).to(tl.int64)
    m_rows = o_rows < num_rows
    m_outs = o_outs < num_outs
    o_rows = o_rows.to(tl.int64)
    o_outs = o_outs.to(tl.int64)
    b_stream = stream_product(
        x_ptr + o_rows[:, None] * stride_x_m,
        deltas_ptr + o_outs[None, :] * stride_deltas_n + k * stride_deltas_k,
        m_rows[:, None],
        m_outs[None, :],
        num_ins,
        stride_x_d,
        stride_deltas_d,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    p_dy = dy_ptr + o_rows[:, None] * stride_dy_m + o_outs[None, :] * stride_dy_n
    b_dy = tl.load(p_dy, mask=m_rows[:, None] & m_outs[None, :], other=0.0).to(tl.float32)
    p_partial = partial_ptr + (i_outs.to(tl.int64) * num_rows + o_rows) * num_copies + k
    tl.store(p_partial, tl.sum(b_dy * b_stream, axis=1), mask=m_rows)


@triton.jit
def weighting_sum_kernel(
    partial_ptr,
    row_map_ptr,
    out_ptr,
    num_rows,
    num_partials,
    num_copies,
    stride_partial,
    stride_map,
    BLOCK_M: tl.constexpr,
):
    """Computes out[s, k] = the sum over rows m with row_map[m] = s, and over i, of partial[i, m, k], in a fixed order.

    One program per (s, k) reads every row: no atomics and no sorting, at S K reads of a small array.
    """
    s = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start_m in range(0, num_rows, BLOCK_M):
        o_rows = start_m + tl.arange(0, BLOCK_M)
        m_rows = o_rows < num_rows
        o_rows = o_rows.to(tl.int64)
        b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=-1)
        m_mine = m_rows & (b_weighting == s)
        p_partial = partial_ptr + o_rows * num_copies + k
        for _ in range(num_partials):
            b_sum += tl.load(p_partial, mask=m_mine, other=0.0)
            p_partial += stride_partial
    tl.store(out_ptr + s.to(tl.int64) * num_copies + k, tl.sum(b_sum, axis=0))
