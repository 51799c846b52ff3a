"""Triton kernels of `mixed_embedding`: the look-up, the sum over an id's positions, the coefficients' terms.

Legend: M token positions, V vocabulary, D width, K copies, S distinct weightings. Names: `o_` offsets, `m_` masks, `p_`
pointers, `b_` values. Sums are float32, in a fixed order, and rounded once.
"""

import triton
import triton.language as tl


# debug: the assertion about ids is the operator's documented error on a GPU, as it is F.embedding's.
@triton.jit(debug=True)
def mixed_embedding_kernel(
    ids_ptr,
    base_ptr,
    deltas_ptr,
    coefficients_ptr,
    row_map_ptr,
    y_ptr,
    num_rows,
    num_ins,
    num_copies,
    num_tokens,
    stride_ids,
    stride_base_v,
    stride_base_d,
    stride_deltas_v,
    stride_deltas_k,
    stride_deltas_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    HAS_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes a tile of y[m] = base[ids[m]] + sum_k c[m, k] deltas[ids[m], k]; a copy whose c is 0 is not read.

    Assumes row_map values in [0, S) and a contiguous y.
    """
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ins = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_rows = o_rows < num_rows
    m_ins = o_ins < num_ins
    o_rows = o_rows.to(tl.int64)
    o_ins = o_ins.to(tl.int64)
    m_tile = m_rows[:, None] & m_ins[None, :]
    b_ids = tl.load(ids_ptr + o_rows * stride_ids, mask=m_rows, other=0)
    tl.device_assert((b_ids >= 0) & (b_ids < num_tokens), "ids outside [0, V) of the embedding's rows")
    b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
    p_c = coefficients_ptr + b_weighting * stride_c_s
    p_delta = deltas_ptr + b_ids[:, None] * stride_deltas_v + o_ins[None, :] * stride_deltas_d

    b_y = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for _ in range(num_copies):
        b_c = tl.load(p_c, mask=m_rows, other=0.0)
        b_delta = tl.load(p_delta, mask=m_tile & (b_c != 0.0)[:, None], other=0.0)
        b_y += b_c[:, None] * b_delta.to(tl.float32)
        p_c += stride_c_k
        p_delta += stride_deltas_k
    if HAS_BASE:
        p_base = base_ptr + b_ids[:, None] * stride_base_v + o_ins[None, :] * stride_base_d
        b_y += tl.load(p_base, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_rows[:, None] * num_ins + o_ins[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def position_sum_kernel(
    dy_ptr,
    sorted_ids_ptr,
    order_ptr,
    ends_ptr,
    coefficients_ptr,
    row_map_ptr,
    out_ptr,
    num_ins,
    num_copies,
    padding_idx,
    stride_dy_m,
    stride_dy_d,
    stride_c_s,
    stride_c_k,
    stride_map,
    HAS_COEFFICIENTS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes out[v, k] (+)= the sum of c[m, k] dy[m] over the positions m of id v, for every v that occurs.

    The positions come sorted by id (stable), with the end of the run that each stands in. A run's first position alone
    has a program that does anything, so each row of `out` has one writer, and its sum runs over ascending positions.
    Assumes row_map values in [0, S) and a contiguous out [V, K, D].
    """
    i = tl.program_id(0).to(tl.int64)
    o_ins = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(2).to(tl.int64)
    m_ins = o_ins < num_ins
    o_ins = o_ins.to(tl.int64)
    token = tl.load(sorted_ids_ptr + i)
    previous_end = tl.load(ends_ptr + i - 1, mask=i > 0, other=0)
    if (previous_end == i) & (token != padding_idx):
        end = tl.load(ends_ptr + i)
        b_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for start in range(i, end, BLOCK_M):
            o_sorted = start + tl.arange(0, BLOCK_M)
            m_rows = o_sorted < end
            o_rows = tl.load(order_ptr + o_sorted, mask=m_rows, other=0)
            p_dy = dy_ptr + o_rows[:, None] * stride_dy_m + o_ins[None, :] * stride_dy_d
            b_dy = tl.load(p_dy, mask=m_rows[:, None] & m_ins[None, :], other=0.0).to(tl.float32)
            if HAS_COEFFICIENTS:
                b_weighting = tl.load(row_map_ptr + o_rows * stride_map, mask=m_rows, other=0).to(tl.int64)
                p_c = coefficients_ptr + b_weighting * stride_c_s + k * stride_c_k
                b_dy *= tl.load(p_c, mask=m_rows, other=0.0)[:, None]
            b_sum += b_dy
        b_out = tl.sum(b_sum, axis=0)
        p_out = out_ptr + (token * num_copies + k) * num_ins + o_ins
        if ADDS:
            b_out += tl.load(p_out, mask=m_ins, other=0.0)
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_ins)


@triton.jit
def coefficient_terms_kernel(
    dy_ptr,
    ids_ptr,
    deltas_ptr,
    terms_ptr,
    num_rows,
    num_ins,
    num_copies,
    stride_dy_m,
    stride_dy_d,
    stride_ids,
    stride_deltas_v,
    stride_deltas_k,
    stride_deltas_d,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes terms[m, k] = sum_d dy[m, d] deltas[ids[m], k, d]. Assumes a contiguous terms [M, K]."""
    o_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64)
    m_rows = o_rows < num_rows
    o_rows = o_rows.to(tl.int64)
    b_ids = tl.load(ids_ptr + o_rows * stride_ids, mask=m_rows, other=0)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start_d in range(0, num_ins, BLOCK_D):
        o_ins = start_d + tl.arange(0, BLOCK_D)
        m_tile = m_rows[:, None] & (o_ins < num_ins)[None, :]
        o_ins = o_ins.to(tl.int64)
        p_dy = dy_ptr + o_rows[:, None] * stride_dy_m + o_ins[None, :] * stride_dy_d
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        p_delta = deltas_ptr + b_ids[:, None] * stride_deltas_v + k * stride_deltas_k + o_ins[None, :] * stride_deltas_d
        b_sum += b_dy * tl.load(p_delta, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(terms_ptr + o_rows * num_copies + k, tl.sum(b_sum, axis=1), mask=m_rows)
