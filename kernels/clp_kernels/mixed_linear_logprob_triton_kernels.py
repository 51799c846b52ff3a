"""Triton kernels of `mixed_linear_logprob`: an online softmax over the vocabulary; the gradient of the head's output.

Legend: M rows, D in, V vocabulary, K copies, P splits of the vocabulary; C the tokens of one chunk of it. Names: `o_`
offsets, `m_` masks, `p_` pointers, `b_` values; y is the head's output, z the logits, capped(logit_scale y) /
temperature.

y is a tile of `mixed_product_tile`: one float32 accumulator for each stream, any mixture of weightings in a tile, a
row's bits independent of its neighbours. Rows without a target are read as zeros and their results are stored as zeros,
so what lies in them reaches nothing.
"""

import triton
import triton.language as tl

from clp_kernels.mixed_linear_triton_kernels import mixed_product_tile

# The largest logit so far starts finite, so that tokens of logit -inf alone make no NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(b_x):
    """Returns tanh(x): its Taylor series below 1/4 (relative error 1e-8), where the quotient would cancel."""
    b_square = b_x * b_x
    b_series = 62.0 / 2835.0 * b_square - 17.0 / 315.0
    b_series = (b_series * b_square + 2.0 / 15.0) * b_square - 1.0 / 3.0
    b_small = b_x + b_x * (b_square * b_series)
    b_exp = tl.exp(-2.0 * tl.abs(b_x))
    b_large = (1.0 - b_exp) / (1.0 + b_exp)
    return tl.where(tl.abs(b_x) < 0.25, b_small, tl.where(b_x < 0.0, -b_large, b_large))


@triton.jit
def _logits_and_slope(b_y, slope, into_cap, out_of_cap, HAS_SOFTCAP: tl.constexpr):
    """Returns z and dz/dy; slope = logit_scale / temperature is dz/dy where y is 0 or nothing is capped."""
    b_z = b_y * slope
    b_slope = slope
    if HAS_SOFTCAP:
        b_bent = _tanh(b_y * into_cap)
        b_z = b_bent * out_of_cap
        b_slope = (1.0 - b_bent * b_bent) * slope
    return b_z, b_slope


@triton.jit
def _merge(b_max, b_sum, b_weighted, b_other_max, b_other_sum, b_other_weighted):
    """Returns max z, sum e^(z - max) and sum e^(z - max) (z - max) over two sets of tokens from those of each."""
    b_new_max = tl.maximum(b_max, b_other_max)
    b_fall = b_max - b_new_max
    b_other_fall = b_other_max - b_new_max
    b_scale = tl.exp(b_fall)
    b_other_scale = tl.exp(b_other_fall)
    b_weighted = b_scale * (b_weighted + b_fall * b_sum)
    b_weighted += b_other_scale * (b_other_weighted + b_other_fall * b_other_sum)
    return b_new_max, b_scale * b_sum + b_other_scale * b_other_sum, b_weighted


@triton.jit
def softmax_partials_kernel(
    hidden_ptr,
    base_ptr,
    deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    bias_ptr,
    bias_deltas_ptr,
    targets_ptr,
    partials_ptr,
    num_rows,
    num_tokens,
    num_ins,
    num_copies,
    tokens_per_split,
    ignore_index,
    stride_hidden_m,
    stride_hidden_d,
    stride_base_v,
    stride_base_d,
    stride_deltas_v,
    stride_deltas_k,
    stride_deltas_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    stride_bias,
    stride_bias_deltas_v,
    stride_bias_deltas_k,
    stride_targets,
    slope,
    into_cap,
    out_of_cap,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_ENTROPY: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes over the p-th split of the vocabulary, for each row: z of the target, max z, sum e^(z - max) and, where
    entropy is needed, sum e^(z - max) (z - max), by which it does not cancel where logits are large.

    Assumes a contiguous partials [P, 4, M] and tokens_per_split a multiple of BLOCK_O. Row blocks are the fast axis of
    the grid: programs that run at the same time read the same tokens' weights.
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_split = tl.program_id(1)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    b_target = tl.load(targets_ptr + o_rows * stride_targets, mask=m_rows, other=ignore_index)
    m_kept = m_rows & (b_target != ignore_index)

    b_picked = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin = i_split * tokens_per_split
    # Nothing is computed where no row of the block has a target.
    end = tl.where(tl.max(m_kept.to(tl.int32), axis=0) > 0, tl.minimum(begin + tokens_per_split, num_tokens), begin)
    for first in tl.range(begin, end, BLOCK_O, disable_licm=True):
        o_tokens = first + tl.arange(0, BLOCK_O)
        m_tokens = o_tokens < num_tokens
        o_tokens = o_tokens.to(tl.int64)
        b_y = mixed_product_tile(
            hidden_ptr, base_ptr, deltas_ptr, coefficients_ptr, row_map_ptr, bias_ptr, bias_deltas_ptr,
            o_rows, m_kept, o_tokens, m_tokens, num_ins, num_copies,
            stride_hidden_m, stride_hidden_d, stride_base_v, stride_base_d,
            stride_deltas_v, stride_deltas_k, stride_deltas_d,
            stride_c_s, stride_c_k, stride_map, stride_bias, stride_bias_deltas_v, stride_bias_deltas_k,
            HAS_BASE, HAS_BIAS, HAS_BIAS_DELTAS, BASE_PRECISION, DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
        )  # fmt: skip
        b_z, _ = _logits_and_slope(b_y, slope, into_cap, out_of_cap, HAS_SOFTCAP)
        b_picked += tl.sum(tl.where(o_tokens[None, :] == b_target[:, None], b_z, 0.0), axis=1)
        b_z = tl.where(m_tokens[None, :], b_z, -float("inf"))
        b_tile_max = tl.maximum(tl.max(b_z, axis=1), _LOWEST)
        b_below = b_z - b_tile_max[:, None]
        b_exp = tl.exp(b_below)
        b_terms = b_exp * tl.where(b_exp == 0.0, 0.0, b_below)
        b_max, b_sum, b_weighted = _merge(
            b_max, b_sum, b_weighted, b_tile_max, tl.sum(b_exp, axis=1), tl.sum(b_terms, axis=1)
        )

    p_partial = partials_ptr + i_split.to(tl.int64) * 4 * num_rows + o_rows
    tl.store(p_partial, b_picked, mask=m_rows)
    tl.store(p_partial + num_rows, b_max, mask=m_rows)
    tl.store(p_partial + 2 * num_rows, b_sum, mask=m_rows)
    if NEEDS_ENTROPY:
        tl.store(p_partial + 3 * num_rows, b_weighted, mask=m_rows)


@triton.jit
def softmax_kernel(
    partials_ptr,
    targets_ptr,
    logprob_ptr,
    entropy_ptr,
    normalizer_ptr,
    num_rows,
    num_splits,
    ignore_index,
    stride_targets,
    NEEDS_ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merges the partials [P, 4, M] of each row in the order of the splits: its log-prob, entropy and normalizer.

    Assumes contiguous outputs [M], [M] and [M, 2]: max z and log sum e^(z - max).
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    m_kept = m_rows & (tl.load(targets_ptr + o_rows * stride_targets, mask=m_rows, other=0) != ignore_index)
    b_picked = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_split_weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    p_partial = partials_ptr + o_rows
    for _ in range(num_splits):
        b_picked += tl.load(p_partial, mask=m_kept, other=0.0)
        b_split_max = tl.load(p_partial + num_rows, mask=m_kept, other=0.0)
        b_split_sum = tl.load(p_partial + 2 * num_rows, mask=m_kept, other=1.0)
        if NEEDS_ENTROPY:
            b_split_weighted = tl.load(p_partial + 3 * num_rows, mask=m_kept, other=0.0)
        b_max, b_sum, b_weighted = _merge(b_max, b_sum, b_weighted, b_split_max, b_split_sum, b_split_weighted)
        p_partial += 4 * num_rows
    b_log_sum = tl.log(b_sum)
    tl.store(logprob_ptr + o_rows, tl.where(m_kept, b_picked - b_max - b_log_sum, 0.0), mask=m_rows)
    if NEEDS_ENTROPY:
        tl.store(entropy_ptr + o_rows, tl.where(m_kept, b_log_sum - b_weighted / b_sum, 0.0), mask=m_rows)
    tl.store(normalizer_ptr + 2 * o_rows, tl.where(m_kept, b_max, 0.0), mask=m_rows)
    tl.store(normalizer_ptr + 2 * o_rows + 1, tl.where(m_kept, b_log_sum, 0.0), mask=m_rows)


@triton.jit
def output_gradient_kernel(
    hidden_ptr,
    base_ptr,
    deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    bias_ptr,
    bias_deltas_ptr,
    targets_ptr,
    normalizer_ptr,
    entropy_ptr,
    d_logprob_ptr,
    d_entropy_ptr,
    dy_ptr,
    num_rows,
    num_tokens,
    num_ins,
    num_copies,
    first_token,
    ignore_index,
    stride_hidden_m,
    stride_hidden_d,
    stride_base_v,
    stride_base_d,
    stride_deltas_v,
    stride_deltas_k,
    stride_deltas_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    stride_bias,
    stride_bias_deltas_v,
    stride_bias_deltas_k,
    stride_targets,
    slope,
    into_cap,
    out_of_cap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_DELTAS: tl.constexpr,
    BASE_PRECISION: tl.constexpr,
    DELTAS_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes a tile of dy_MC = (d_logprob (onehot - p) - d_entropy p (log p + entropy)) dz/dy; 0 without a target.

    The head is that of the chunk's tokens alone, which are first_token and those that follow. Assumes contiguous
    [M] tensors, normalizer [M, 2] and dy_MC float32.
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_tokens = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_rows = o_rows < num_rows
    m_tokens = o_tokens < num_tokens
    o_rows = o_rows.to(tl.int64)
    o_tokens = o_tokens.to(tl.int64)
    b_target = tl.load(targets_ptr + o_rows * stride_targets, mask=m_rows, other=ignore_index)
    m_kept = m_rows & (b_target != ignore_index)
    b_y = mixed_product_tile(
        hidden_ptr, base_ptr, deltas_ptr, coefficients_ptr, row_map_ptr, bias_ptr, bias_deltas_ptr,
        o_rows, m_kept, o_tokens, m_tokens, num_ins, num_copies,
        stride_hidden_m, stride_hidden_d, stride_base_v, stride_base_d,
        stride_deltas_v, stride_deltas_k, stride_deltas_d,
        stride_c_s, stride_c_k, stride_map, stride_bias, stride_bias_deltas_v, stride_bias_deltas_k,
        HAS_BASE, HAS_BIAS, HAS_BIAS_DELTAS, BASE_PRECISION, DELTAS_PRECISION, BLOCK_M, BLOCK_O, BLOCK_R,
    )  # fmt: skip
    b_z, b_slope = _logits_and_slope(b_y, slope, into_cap, out_of_cap, HAS_SOFTCAP)
    b_max = tl.load(normalizer_ptr + 2 * o_rows, mask=m_kept, other=0.0)
    b_log_sum = tl.load(normalizer_ptr + 2 * o_rows + 1, mask=m_kept, other=0.0)
    b_log_p = b_z - b_max[:, None] - b_log_sum[:, None]
    b_p = tl.exp(b_log_p)
    b_d_logprob = tl.load(d_logprob_ptr + o_rows, mask=m_kept, other=0.0)[:, None]
    is_target = first_token + o_tokens[None, :] == b_target[:, None]
    b_dz = tl.where(is_target, b_d_logprob, 0.0) - b_d_logprob * b_p
    if HAS_ENTROPY_GRAD:
        b_entropy = tl.load(entropy_ptr + o_rows, mask=m_kept, other=0.0)[:, None]
        b_d_entropy = tl.load(d_entropy_ptr + o_rows, mask=m_kept, other=0.0)[:, None]
        b_dz -= b_d_entropy * b_p * tl.where(b_p == 0.0, 0.0, b_log_p + b_entropy)
    p_dy = dy_ptr + o_rows[:, None] * num_tokens + o_tokens[None, :]
    tl.store(p_dy, tl.where(m_kept[:, None], b_dz * b_slope, 0.0), mask=m_rows[:, None] & m_tokens[None, :])
