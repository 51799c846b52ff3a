"""Triton kernels of `mixed_linear` for many rows per weighting: the copies are mixed on chip, tile by tile.

Legend: M rows, D in, N out, K copies, S distinct weightings; R the reduced and O the output dimension of one product
(forward: R = D, O = N; input gradient: R = N, O = D). Names: `o_` offsets, `m_` masks, `p_` pointers, `b_` values.

A program multiplies its rows weighting by weighting, with the rows of the others masked to zero: a tile of one
weighting is one walk over R, a tile across a border of segments two. The masked rows add exact zeros, so a row's bits
do not depend on its neighbours' weightings.

Rounding: a mix is formed in float32 and rounded once, to the rows' dtype, as an operand. EXACT: the base is an operand
of its own, and a mix without a base goes as two that sum to it (its rounding, and the rounding of the rest), so a delta
keeps its effect however small it is beside the base. Not EXACT: base and deltas are one mix, at half the products.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(num_tiles_m, num_tiles_o, GROUP: tl.constexpr):
    """Returns the tile (m, o) of this program: GROUP output tiles walk the rows together, so that both stay in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * num_tiles_m)
    first_o = group * GROUP
    size = min(num_tiles_o - first_o, GROUP)
    within = program % (GROUP * num_tiles_m)
    return within // size, first_o + within % size


@triton.jit
def segment_product_kernel(
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
    K: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Stores a tile of a_MR (base + sum_k c_k delta_k)_RO + bias + sum_k c_k bias_delta_k in out_MO.

    The weights are the left operand, so that the mix goes from registers into the tensor cores. Assumes row_map values
    in [0, S) and a contiguous out_MO; everything else comes with its strides, offsets are int64.
    """
    NONE: tl.constexpr = 2147483647
    i_rows, i_outs = grouped_tile(tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outs, BLOCK_O), GROUP)
    o_rows = i_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    o_outs = i_outs * BLOCK_O + tl.arange(0, BLOCK_O)
    o_reduced = tl.arange(0, BLOCK_R).to(tl.int64)
    m_rows = o_rows < num_rows
    m_outs = o_outs < num_outs
    o_rows = o_rows.to(tl.int64)
    o_outs = o_outs.to(tl.int64)
    b_map = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=NONE)
    o_delta = o_outs[:, None] * stride_deltas_o + o_reduced[None, :] * stride_deltas_r
    o_base = o_outs[:, None] * stride_base_o + o_reduced[None, :] * stride_base_r
    o_a = o_reduced[:, None] * stride_a_r + o_rows[None, :] * stride_a_m

    b_acc = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.float32)
    weighting = tl.min(b_map)
    while weighting < NONE:
        m_mine = b_map == weighting
        p_c = coefficients_ptr + weighting.to(tl.int64) * stride_c_s
        p_a = a_ptr + o_a
        p_base = base_ptr + o_base if HAS_BASE else None
        p_delta = deltas_ptr + o_delta
        for start in range(0, num_reduced, BLOCK_R):
            m_reduced = o_reduced < num_reduced - start
            m_weights = m_outs[:, None] & m_reduced[None, :]
            b_a = tl.load(p_a, mask=m_reduced[:, None] & m_mine[None, :], other=0.0)
            b_mix = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
            for k in tl.static_range(K):
                b_c = tl.load(p_c + k * stride_c_k).to(tl.float32)
                b_mix += b_c * tl.load(p_delta + k * stride_deltas_k, mask=m_weights, other=0.0).to(tl.float32)
            if HAS_BASE:
                b_base = tl.load(p_base, mask=m_weights, other=0.0)
                p_base += BLOCK_R * stride_base_r
                if EXACT:
                    b_acc = tl.dot(b_base, b_a, acc=b_acc, input_precision="ieee")
                else:
                    b_mix += b_base.to(tl.float32)
            b_high = b_mix.to(b_a.dtype)
            b_acc = tl.dot(b_high, b_a, acc=b_acc, input_precision="ieee")
            if EXACT and not HAS_BASE:
                b_low = (b_mix - b_high.to(tl.float32)).to(b_a.dtype)
                b_acc = tl.dot(b_low, b_a, acc=b_acc, input_precision="ieee")
            p_a += BLOCK_R * stride_a_r
            p_delta += BLOCK_R * stride_deltas_r
        weighting = tl.min(tl.where(b_map > weighting, b_map, NONE))

    b_out = tl.trans(b_acc)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_outs * stride_bias, mask=m_outs, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS_DELTAS:
        p_c_rows = coefficients_ptr + tl.where(m_rows, b_map, 0).to(tl.int64) * stride_c_s
        p_bias_delta = bias_deltas_ptr + o_outs * stride_bias_deltas_n
        for k in tl.static_range(K):
            b_bias = tl.load(p_bias_delta + k * stride_bias_deltas_k, mask=m_outs, other=0.0).to(tl.float32)
            b_out += tl.load(p_c_rows + k * stride_c_k).to(tl.float32)[:, None] * b_bias[None, :]
    p_out = out_ptr + o_rows[:, None] * num_outs + o_outs[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_rows[:, None] & m_outs[None, :])


@triton.jit
def run_ends_kernel(row_map_ptr, run_ends_ptr, num_rows, stride_map, BLOCK_M: tl.constexpr):
    """Stores for each row the first row after it that has another weighting, or `num_rows`."""
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    b_map = tl.load(row_map_ptr + o_rows.to(tl.int64) * stride_map, mask=m_rows, other=-1)
    b_next = tl.load(row_map_ptr + (o_rows + 1).to(tl.int64) * stride_map, mask=o_rows + 1 < num_rows, other=-1)
    # The run of the block's last row ends in a later block as a rule: look ahead, a block at a time.
    last = tl.minimum(tl.program_id(0) * BLOCK_M + BLOCK_M, num_rows) - 1
    weighting = tl.load(row_map_ptr + last.to(tl.int64) * stride_map)
    end = num_rows
    start = last + 1
    while start < end:
        o_ahead = start + tl.arange(0, BLOCK_M)
        m_ahead = o_ahead < num_rows
        b_ahead = tl.load(row_map_ptr + o_ahead.to(tl.int64) * stride_map, mask=m_ahead, other=-1)
        end = tl.minimum(end, tl.min(tl.where(m_ahead & (b_ahead != weighting), o_ahead, end)))
        start += BLOCK_M
    b_ends = tl.where((b_map != b_next) & (o_rows < last), o_rows + 1, end)
    b_ends = tl.associative_scan(b_ends, 0, smaller, reverse=True)
    tl.store(run_ends_ptr + o_rows, b_ends, mask=m_rows)


@triton.jit
def smaller(a, b):
    """Returns the smaller one: the scan's operation."""
    return tl.minimum(a, b)


@triton.jit
def segment_gradient_kernel(
    dy_ptr,
    x_ptr,
    coefficients_ptr,
    row_map_ptr,
    run_ends_ptr,
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
    HAS_SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Computes a tile of d_deltas[n, k, d] = sum_s c[s, k] G_s[n, d], G_s = sum over the rows of s of dy[m, n] x[m, d].

    One walk over the rows serves two copies (one, where K is odd, in the last): G_s stays on chip and is added to both
    accumulators where the run of its weighting ends. Stored, or added to what is there. Assumes row_map values in
    [0, S) and a contiguous d_deltas [N, K, D].
    """
    i_outs, i_ins = grouped_tile(tl.cdiv(num_outs, BLOCK_N), tl.cdiv(num_ins, BLOCK_D), GROUP)
    k = tl.program_id(1).to(tl.int64) * 2
    has_second = k + 1 < num_copies
    o_outs = i_outs * BLOCK_N + tl.arange(0, BLOCK_N)
    o_ins = i_ins * BLOCK_D + tl.arange(0, BLOCK_D)
    m_outs = o_outs < num_outs
    m_ins = o_ins < num_ins
    o_outs = o_outs.to(tl.int64)
    o_ins = o_ins.to(tl.int64)
    o_steps = tl.arange(0, BLOCK_M)

    b_first = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_second = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    start = 0
    while start < num_rows:
        end = tl.load(run_ends_ptr + start)
        weighting = tl.load(row_map_ptr + tl.cast(start, tl.int64) * stride_map).to(tl.int64)
        b_segment = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for start_m in range(start, end, BLOCK_M):
            o_rows = start_m + o_steps
            m_rows = o_rows < end
            o_rows = o_rows.to(tl.int64)
            p_dy = dy_ptr + o_outs[:, None] * stride_dy_n + o_rows[None, :] * stride_dy_m
            b_dy = tl.load(p_dy, mask=m_outs[:, None] & m_rows[None, :], other=0.0)
            p_x = x_ptr + o_rows[:, None] * stride_x_m + o_ins[None, :] * stride_x_d
            b_x = tl.load(p_x, mask=m_rows[:, None] & m_ins[None, :], other=0.0)
            b_segment = tl.dot(b_dy, b_x, acc=b_segment, input_precision="ieee")
        p_c = coefficients_ptr + weighting * stride_c_s + k * stride_c_k
        b_first += tl.load(p_c).to(tl.float32) * b_segment
        if HAS_SECOND:
            b_second += tl.load(p_c + stride_c_k, mask=has_second, other=0.0).to(tl.float32) * b_segment
        start = end
    p_out = d_deltas_ptr + (o_outs[:, None] * num_copies + k) * num_ins + o_ins[None, :]
    m_out = m_outs[:, None] & m_ins[None, :]
    store_or_add(p_out, b_first, m_out, d_deltas_ptr.dtype.element_ty, ADDS)
    if HAS_SECOND:
        store_or_add(p_out + num_ins, b_second, m_out & has_second, d_deltas_ptr.dtype.element_ty, ADDS)


@triton.jit
def store_or_add(p_out, b_value, m_out, dtype, ADDS: tl.constexpr):
    """Stores a float32 block, or adds it to what is there in float32; rounded once."""
    if ADDS:
        b_value += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_value.to(dtype), mask=m_out)
