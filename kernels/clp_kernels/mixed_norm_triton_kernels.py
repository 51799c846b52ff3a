"""Triton kernels of `mixed_norm`: the norm, its gradient row by row, the gradient of its parameters column by column.

Legend: M rows, D width, K copies, S distinct weightings, P splits of the rows. Names: `o_` offsets, `m_` masks, `p_`
pointers, `b_` values.

Everything is float32 from the first read to the last write. A program holds some rows, walks D in blocks, and mixes the
parameters of a block for each row: no mixed scale exists in memory. What it reads more than once per row (x) is a row
that the cache has just seen.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(
    parameter_ptr,
    deltas_ptr,
    p_c_M,
    m_rows_M,
    o_ins_D,
    m_ins_D,
    num_copies,
    stride_parameter,
    stride_deltas_d,
    stride_deltas_k,
    stride_c_k,
    HAS_PARAMETER: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns each row's parameter + sum_k c_k delta_k for a block of D, small terms first."""
    b_mix = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    if HAS_DELTAS:
        p_delta = deltas_ptr + o_ins_D * stride_deltas_d
        for _ in range(num_copies):
            b_c = tl.load(p_c_M, mask=m_rows_M, other=0.0)
            b_delta = tl.load(p_delta, mask=m_ins_D, other=0.0).to(tl.float32)
            b_mix += b_c[:, None] * b_delta[None, :]
            p_c_M += stride_c_k
            p_delta += stride_deltas_k
    if HAS_PARAMETER:
        b_parameter = tl.load(parameter_ptr + o_ins_D * stride_parameter, mask=m_ins_D, other=0.0)
        b_mix += b_parameter.to(tl.float32)[None, :]
    return b_mix


@triton.jit
def _row_statistics(
    p_x_M1,
    m_rows_M1,
    num_ins,
    stride_x_d,
    eps,
    IS_CENTERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns each row's mean (0 for RMSNorm) and the factor rstd that takes its scale out."""
    b_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if IS_CENTERED:
        b_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for start_d in range(0, num_ins, BLOCK_D):
            o_ins = start_d + tl.arange(0, BLOCK_D)
            m_tile = m_rows_M1 & (o_ins < num_ins)[None, :]
            p_x = p_x_M1 + o_ins.to(tl.int64)[None, :] * stride_x_d
            b_sum += tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32)
        b_mean = tl.sum(b_sum, axis=1) / num_ins
    b_squares = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start_d in range(0, num_ins, BLOCK_D):
        o_ins = start_d + tl.arange(0, BLOCK_D)
        m_tile = m_rows_M1 & (o_ins < num_ins)[None, :]
        p_x = p_x_M1 + o_ins.to(tl.int64)[None, :] * stride_x_d
        b_centred = tl.load(p_x, mask=m_tile, other=0.0).to(tl.float32) - b_mean[:, None]
        b_squares += tl.where(m_tile, b_centred * b_centred, 0.0)
    return b_mean, tl.rsqrt(tl.sum(b_squares, axis=1) / num_ins + eps)


@triton.jit
def _normalised(p_x_row_M1, m_tile_MD, o_ins_D, stride_x_d, b_mean_M, b_rstd_M, CASTS: tl.constexpr):
    """Returns a block of norm(x) in float32; CASTS: rounded to x's dtype."""
    b_x = tl.load(p_x_row_M1 + o_ins_D[None, :] * stride_x_d, mask=m_tile_MD, other=0.0)
    b_n = (b_x.to(tl.float32) - b_mean_M[:, None]) * b_rstd_M[:, None]
    if CASTS:
        b_n = b_n.to(b_x.dtype).to(tl.float32)
    return b_n


@triton.jit
def mixed_norm_kernel(
    x_ptr,
    weight_ptr,
    weight_deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    bias_ptr,
    bias_deltas_ptr,
    y_ptr,
    num_rows,
    num_ins,
    num_copies,
    eps,
    offset,
    stride_x_m,
    stride_x_d,
    stride_weight,
    stride_weight_deltas_d,
    stride_weight_deltas_k,
    stride_c_s,
    stride_c_k,
    stride_map,
    stride_bias,
    stride_bias_deltas_d,
    stride_bias_deltas_k,
    IS_CENTERED: tl.constexpr,
    CASTS_BEFORE_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes some rows of y = norm(x) (offset + weight + sum_k c_k weight_delta_k) + bias + sum_k c_k bias_delta_k.

    Assumes row_map values in [0, S) and a contiguous y; everything else comes with its strides.
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
    p_c = coefficients_ptr + b_weighting * stride_c_s
    p_x_row = x_ptr + o_rows[:, None] * stride_x_m
    b_mean, b_rstd = _row_statistics(p_x_row, m_rows[:, None], num_ins, stride_x_d, eps, IS_CENTERED, BLOCK_M, BLOCK_D)
    for start_d in range(0, num_ins, BLOCK_D):
        o_ins = start_d + tl.arange(0, BLOCK_D)
        m_ins = o_ins < num_ins
        o_ins = o_ins.to(tl.int64)
        m_tile = m_rows[:, None] & m_ins[None, :]
        b_y = _normalised(p_x_row, m_tile, o_ins, stride_x_d, b_mean, b_rstd, CASTS_BEFORE_SCALE)
        b_y *= offset + _mix(
            weight_ptr, weight_deltas_ptr, p_c, m_rows, o_ins, m_ins, num_copies, stride_weight,
            stride_weight_deltas_d, stride_weight_deltas_k, stride_c_k, HAS_WEIGHT, True, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if HAS_BIAS or HAS_BIAS_DELTAS:
            b_y += _mix(
                bias_ptr, bias_deltas_ptr, p_c, m_rows, o_ins, m_ins, num_copies, stride_bias,
                stride_bias_deltas_d, stride_bias_deltas_k, stride_c_k, HAS_BIAS, HAS_BIAS_DELTAS, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        p_y = y_ptr + o_rows[:, None] * num_ins + o_ins[None, :]
        tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def input_gradient_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    weight_deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    dx_ptr,
    statistics_ptr,
    num_rows,
    num_ins,
    num_copies,
    eps,
    offset,
    stride_dy_m,
    stride_dy_d,
    stride_x_m,
    stride_x_d,
    stride_weight,
    stride_weight_deltas_d,
    stride_weight_deltas_k,
    stride_c_s,
    stride_c_k,
    stride_map,
    IS_CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes for some rows their mean and rstd, which the gradients of the parameters read, and dx.

    With g = dy times the mixed scale and xhat = norm(x): dx = rstd (g - mean(g) - xhat mean(g xhat)), for RMSNorm
    without mean(g). Assumes row_map values in [0, S), contiguous dx and statistics [2, M].
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    p_x_row = x_ptr + o_rows[:, None] * stride_x_m
    b_mean, b_rstd = _row_statistics(p_x_row, m_rows[:, None], num_ins, stride_x_d, eps, IS_CENTERED, BLOCK_M, BLOCK_D)
    tl.store(statistics_ptr + o_rows, b_mean, mask=m_rows)
    tl.store(statistics_ptr + num_rows + o_rows, b_rstd, mask=m_rows)
    if NEEDS_X:
        b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
        p_c = coefficients_ptr + b_weighting * stride_c_s
        p_dy_row = dy_ptr + o_rows[:, None] * stride_dy_m
        b_g_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        b_gx_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        b_g_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        b_gx_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
        # Over D twice: for the two means, then for dx.
        for i_pass in tl.static_range(2):
            for start_d in range(0, num_ins, BLOCK_D):
                o_ins = start_d + tl.arange(0, BLOCK_D)
                m_ins = o_ins < num_ins
                o_ins = o_ins.to(tl.int64)
                m_tile = m_rows[:, None] & m_ins[None, :]
                b_xhat = _normalised(p_x_row, m_tile, o_ins, stride_x_d, b_mean, b_rstd, False)
                b_g = tl.load(p_dy_row + o_ins[None, :] * stride_dy_d, mask=m_tile, other=0.0).to(tl.float32)
                b_g *= offset + _mix(
                    weight_ptr, weight_deltas_ptr, p_c, m_rows, o_ins, m_ins, num_copies, stride_weight,
                    stride_weight_deltas_d, stride_weight_deltas_k, stride_c_k, HAS_WEIGHT, True, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                if i_pass == 0:
                    b_g_sum += b_g
                    b_gx_sum += b_g * b_xhat
                else:
                    b_dx = b_rstd[:, None] * (b_g - b_g_mean[:, None] - b_xhat * b_gx_mean[:, None])
                    p_dx = dx_ptr + o_rows[:, None] * num_ins + o_ins[None, :]
                    tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)
            if IS_CENTERED:
                b_g_mean = tl.sum(b_g_sum, axis=1) / num_ins
            b_gx_mean = tl.sum(b_gx_sum, axis=1) / num_ins


@triton.jit
def coefficient_terms_kernel(
    dy_ptr,
    x_ptr,
    weight_deltas_ptr,
    bias_deltas_ptr,
    statistics_ptr,
    terms_ptr,
    num_rows,
    num_ins,
    num_copies,
    stride_dy_m,
    stride_dy_d,
    stride_x_m,
    stride_x_d,
    stride_weight_deltas_d,
    stride_weight_deltas_k,
    stride_bias_deltas_d,
    stride_bias_deltas_k,
    CASTS_BEFORE_SCALE: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes terms[m, k] = sum_d dy[m, d] (norm(x)[m, d] weight_deltas[d, k] + bias_deltas[d, k]).

    Assumes contiguous statistics [2, M] and terms [M, K].
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    b_mean = tl.load(statistics_ptr + o_rows, mask=m_rows, other=0.0)
    b_rstd = tl.load(statistics_ptr + num_rows + o_rows, mask=m_rows, other=0.0)
    p_x_row = x_ptr + o_rows[:, None] * stride_x_m
    p_dy_row = dy_ptr + o_rows[:, None] * stride_dy_m
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start_d in range(0, num_ins, BLOCK_D):
        o_ins = start_d + tl.arange(0, BLOCK_D)
        m_ins = o_ins < num_ins
        o_ins = o_ins.to(tl.int64)
        m_tile = m_rows[:, None] & m_ins[None, :]
        b_n = _normalised(p_x_row, m_tile, o_ins, stride_x_d, b_mean, b_rstd, CASTS_BEFORE_SCALE)
        p_delta = weight_deltas_ptr + o_ins * stride_weight_deltas_d + k * stride_weight_deltas_k
        b_moved = b_n * tl.load(p_delta, mask=m_ins, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS_DELTAS:
            p_delta = bias_deltas_ptr + o_ins * stride_bias_deltas_d + k * stride_bias_deltas_k
            b_moved += tl.load(p_delta, mask=m_ins, other=0.0).to(tl.float32)[None, :]
        b_dy = tl.load(p_dy_row + o_ins[None, :] * stride_dy_d, mask=m_tile, other=0.0).to(tl.float32)
        b_sum += b_dy * b_moved
    tl.store(terms_ptr + o_rows * num_copies + k, tl.sum(b_sum, axis=1), mask=m_rows)


@triton.jit
def parameter_gradients_kernel(
    dy_ptr,
    x_ptr,
    statistics_ptr,
    coefficients_ptr,
    row_map_ptr,
    partial_ptr,
    num_rows,
    num_ins,
    num_copies,
    split_size,
    stride_dy_m,
    stride_dy_d,
    stride_x_m,
    stride_x_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    CASTS_BEFORE_SCALE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes partial[i, 0, j, d] = the i-th split of sum_m a[m, j] dy[m, d] norm(x)[m, d]; [i, 1, j, d] without norm.

    a[m, 0] is 1, which gives the gradient of the parameter itself, and a[m, 1 + k] the row's coefficient of copy k.
    Rows come one after the other. Assumes row_map values in [0, S), contiguous statistics [2, M] and partial [P, 1 (2
    with NEEDS_BIAS), 1 + K, D].
    """
    o_ins = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_split = tl.program_id(1)
    o_parts = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_ins = o_ins < num_ins
    o_ins = o_ins.to(tl.int64)
    m_parts = o_parts <= num_copies
    o_parts = o_parts.to(tl.int64)
    p_c_part = coefficients_ptr + (o_parts - 1) * stride_c_k

    b_scale = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    b_shift = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    start_m = i_split * split_size
    # Unrolled, so that the reads of several rows are under way at once.
    for m in tl.range(start_m, tl.minimum(start_m + split_size, num_rows), loop_unroll_factor=4):
        row = tl.cast(m, tl.int64)
        b_mean = tl.load(statistics_ptr + row)
        b_rstd = tl.load(statistics_ptr + num_rows + row)
        b_x = tl.load(x_ptr + row * stride_x_m + o_ins * stride_x_d, mask=m_ins, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + row * stride_dy_m + o_ins * stride_dy_d, mask=m_ins, other=0.0).to(tl.float32)
        b_n = (b_x - b_mean) * b_rstd
        if CASTS_BEFORE_SCALE:
            b_n = b_n.to(x_ptr.dtype.element_ty).to(tl.float32)
        weighting = tl.load(row_map_ptr + row * stride_map).to(tl.int64)
        b_a = tl.load(p_c_part + weighting * stride_c_s, mask=m_parts & (o_parts > 0), other=1.0)
        b_scale += b_a[:, None] * (b_dy * b_n)[None, :]
        if NEEDS_BIAS:
            b_shift += b_a[:, None] * b_dy[None, :]
    num_kinds = 2 if NEEDS_BIAS else 1
    o_out = (i_split.to(tl.int64) * num_kinds * (num_copies + 1) + o_parts[:, None]) * num_ins + o_ins[None, :]
    m_out = m_parts[:, None] & m_ins[None, :]
    tl.store(partial_ptr + o_out, b_scale, mask=m_out)
    if NEEDS_BIAS:
        tl.store(partial_ptr + o_out + (num_copies + 1) * tl.cast(num_ins, tl.int64), b_shift, mask=m_out)
