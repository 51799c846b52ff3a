"""Triton kernel of `mixed_qkv`: norm, three averaged projections, the norm of each head, rotation, in one launch.

Legend: M rows, D width, E size of a head, O pairs of a block, K copies, S distinct weightings. Names: `o_` offsets,
`m_` masks, `p_` pointers, `b_` values.

A program makes some rows of one head, or of some pairs of its outputs: those that the rotation turns together lie half
a head apart, so it keeps two accumulators. It normalises its rows itself, a read of x from the cache. As in
`mixed_linear_triton_kernels` each stream has a float32 accumulator of its own, and coefficients weight them at the end.
"""

import triton
import triton.language as tl

from clp_kernels.mixed_linear_triton_kernels import multiply_add


@triton.jit
def _row_scale(p_x_M1, m_rows_M1, num_ins, eps, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Returns the factor of each row that takes its scale out."""
    b_squares = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start_d in range(0, num_ins, BLOCK_R):
        o_ins = start_d + tl.arange(0, BLOCK_R)
        b_x = tl.load(p_x_M1 + o_ins[None, :], mask=m_rows_M1 & (o_ins < num_ins)[None, :], other=0.0).to(tl.float32)
        b_squares += b_x * b_x
    return tl.rsqrt(tl.sum(b_squares, axis=1) / num_ins + eps)


@triton.jit
def _pair_products(
    p_x_M1,
    b_scale_M,
    norm_weight_ptr,
    p_low_1O,
    p_high_1O,
    m_rows_M1,
    m_pairs_1O,
    num_ins,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns one stream's products of the normalised rows with both halves of the pairs, float32."""
    b_low = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    b_high = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start_d in range(0, num_ins, BLOCK_R):
        o_ins = start_d + tl.arange(0, BLOCK_R)
        m_ins = o_ins < num_ins
        b_x = tl.load(p_x_M1 + o_ins[None, :], mask=m_rows_M1 & m_ins[None, :], other=0.0)
        b_weight = tl.load(norm_weight_ptr + o_ins, mask=m_ins, other=0.0).to(tl.float32)
        # Rounded where LlamaRMSNorm rounds, before the scale and after it.
        b_n = (b_x.to(tl.float32) * b_scale_M[:, None]).to(b_x.dtype).to(tl.float32)
        b_n = (b_n * b_weight[None, :]).to(b_x.dtype)
        m_w = m_ins[:, None] & m_pairs_1O
        b_low = multiply_add(b_n, tl.load(p_low_1O + o_ins[:, None], mask=m_w, other=0.0), b_low, PRECISION)
        b_high = multiply_add(b_n, tl.load(p_high_1O + o_ins[:, None], mask=m_w, other=0.0), b_high, PRECISION)
    return b_low, b_high


@triton.jit
def _write_heads(
    x_ptr,
    norm_weight_ptr,
    base_ptr,
    deltas_ptr,
    bias_ptr,
    bias_deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    cos_ptr,
    sin_ptr,
    head_norm_ptr,
    out_ptr,
    head,
    i_block,
    num_rows,
    num_ins,
    num_copies,
    num_heads,
    half,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTATES: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Writes some rows of a block of one head's pairs. HAS_NORM: the block is the whole head."""
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pairs = i_block * BLOCK_O + tl.arange(0, BLOCK_O)
    m_rows = o_rows < num_rows
    m_pairs = o_pairs < half
    o_rows = o_rows.to(tl.int64)
    o_low = head.to(tl.int64) * (2 * half) + o_pairs
    o_high = o_low + half
    p_x = x_ptr + o_rows[:, None] * num_ins
    b_scale = _row_scale(p_x, m_rows[:, None], num_ins, eps, BLOCK_M, BLOCK_R)

    p_low = base_ptr + o_low[None, :] * num_ins
    p_high = base_ptr + o_high[None, :] * num_ins
    b_low, b_high = _pair_products(
        p_x, b_scale, norm_weight_ptr, p_low, p_high, m_rows[:, None], m_pairs[None, :], num_ins, BASE_PRECISION,
        BLOCK_M, BLOCK_O, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        b_low += tl.load(bias_ptr + o_low, mask=m_pairs, other=0.0).to(tl.float32)[None, :]
        b_high += tl.load(bias_ptr + o_high, mask=m_pairs, other=0.0).to(tl.float32)[None, :]
    b_weighting = tl.load(row_map_ptr + o_rows, mask=m_rows, other=0).to(tl.int64)
    for k in range(num_copies):
        p_delta_low = deltas_ptr + (o_low[None, :] * num_copies + k) * num_ins
        p_delta_high = deltas_ptr + (o_high[None, :] * num_copies + k) * num_ins
        b_low_k, b_high_k = _pair_products(
            p_x, b_scale, norm_weight_ptr, p_delta_low, p_delta_high, m_rows[:, None], m_pairs[None, :], num_ins,
            DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS_DELTAS:
            p_bias = bias_deltas_ptr + k
            b_low_k += tl.load(p_bias + o_low * num_copies, mask=m_pairs, other=0.0).to(tl.float32)[None, :]
            b_high_k += tl.load(p_bias + o_high * num_copies, mask=m_pairs, other=0.0).to(tl.float32)[None, :]
        b_c = tl.load(coefficients_ptr + b_weighting * num_copies + k, mask=m_rows, other=0.0)
        b_low += b_c[:, None] * b_low_k
        b_high += b_c[:, None] * b_high_k

    dtype = out_ptr.dtype.element_ty
    if HAS_NORM:
        b_mean = (tl.sum(b_low * b_low, axis=1) + tl.sum(b_high * b_high, axis=1)) / (2 * half)
        b_scale = tl.rsqrt(b_mean + eps)
        b_norm_low = tl.load(head_norm_ptr + o_pairs, mask=m_pairs, other=0.0).to(tl.float32)
        b_norm_high = tl.load(head_norm_ptr + half + o_pairs, mask=m_pairs, other=0.0).to(tl.float32)
        b_low = (b_low * b_scale[:, None]).to(dtype).to(tl.float32) * b_norm_low[None, :]
        b_high = (b_high * b_scale[:, None]).to(dtype).to(tl.float32) * b_norm_high[None, :]
    m_out = m_rows[:, None] & m_pairs[None, :]
    if ROTATES:
        o_table = o_rows[:, None] * (2 * half) + o_pairs[None, :]
        b_cos_low = tl.load(cos_ptr + o_table, mask=m_out, other=0.0).to(tl.float32)
        b_sin_low = tl.load(sin_ptr + o_table, mask=m_out, other=0.0).to(tl.float32)
        b_cos_high = tl.load(cos_ptr + half + o_table, mask=m_out, other=0.0).to(tl.float32)
        b_sin_high = tl.load(sin_ptr + half + o_table, mask=m_out, other=0.0).to(tl.float32)
        b_turned = b_low * b_cos_low - b_high * b_sin_low
        b_high = b_high * b_cos_high + b_low * b_sin_high
        b_low = b_turned
    p_out = out_ptr + o_rows[:, None] * (num_heads * 2 * half)
    tl.store(p_out + o_low[None, :], b_low.to(dtype), mask=m_out)
    tl.store(p_out + o_high[None, :], b_high.to(dtype), mask=m_out)


@triton.jit
def mixed_qkv_kernel(
    x_ptr,
    norm_weight_ptr,
    q_base_ptr,
    q_deltas_ptr,
    q_bias_ptr,
    q_bias_deltas_ptr,
    k_base_ptr,
    k_deltas_ptr,
    k_bias_ptr,
    k_bias_deltas_ptr,
    v_base_ptr,
    v_deltas_ptr,
    v_bias_ptr,
    v_bias_deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_rows,
    num_ins,
    num_copies,
    num_q_heads,
    num_k_heads,
    num_v_heads,
    half,
    eps,
    HAS_Q_BIAS: tl.constexpr,
    HAS_Q_BIAS_DELTAS: tl.constexpr,
    HAS_K_BIAS: tl.constexpr,
    HAS_K_BIAS_DELTAS: tl.constexpr,
    HAS_V_BIAS: tl.constexpr,
    HAS_V_BIAS_DELTAS: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    Q_BASE_PRECISION: tl.constexpr,
    Q_DELTAS_PRECISION: tl.constexpr,
    K_BASE_PRECISION: tl.constexpr,
    K_DELTAS_PRECISION: tl.constexpr,
    V_BASE_PRECISION: tl.constexpr,
    V_DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes some rows of a block of pairs of one head of q, k or v.

    Assumes everything contiguous, cos and sin with a row for each of x, and row_map values in [0, S).
    """
    head = tl.program_id(1)
    i_block = tl.program_id(2)
    if head < num_q_heads:
        _write_heads(
            x_ptr, norm_weight_ptr, q_base_ptr, q_deltas_ptr, q_bias_ptr, q_bias_deltas_ptr, coefficients_ptr,
            row_map_ptr, cos_ptr, sin_ptr, q_norm_ptr, q_ptr, head, i_block, num_rows, num_ins, num_copies,
            num_q_heads, half, eps, HAS_Q_BIAS, HAS_Q_BIAS_DELTAS, HAS_Q_NORM, True, Q_BASE_PRECISION,
            Q_DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
        )  # fmt: skip
    elif head < num_q_heads + num_k_heads:
        _write_heads(
            x_ptr, norm_weight_ptr, k_base_ptr, k_deltas_ptr, k_bias_ptr, k_bias_deltas_ptr, coefficients_ptr,
            row_map_ptr, cos_ptr, sin_ptr, k_norm_ptr, k_ptr, head - num_q_heads, i_block, num_rows, num_ins,
            num_copies, num_k_heads, half, eps, HAS_K_BIAS, HAS_K_BIAS_DELTAS, HAS_K_NORM, True, K_BASE_PRECISION,
            K_DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
        )  # fmt: skip
    else:
        _write_heads(
            x_ptr, norm_weight_ptr, v_base_ptr, v_deltas_ptr, v_bias_ptr, v_bias_deltas_ptr, coefficients_ptr,
            row_map_ptr, cos_ptr, sin_ptr, v_ptr, v_ptr, head - num_q_heads - num_k_heads, i_block, num_rows, num_ins,
            num_copies, num_v_heads, half, eps, HAS_V_BIAS, HAS_V_BIAS_DELTAS, False, False, V_BASE_PRECISION,
            V_DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
        )  # fmt: skip
