// The kernel of mixed_qkv beside those of mixed_norm and mixed_linear, for one instruction set; included by
// mixed_rows_cpu_kernels.h. All arithmetic is float32, and what is stored is rounded once.

template <typename X>
CLP_INLINE void widen_row(const X* from, int64_t size, float* to) {
  for_row(size, CLP_BODY { lanes.write(to + d, lanes.read(from + d)); });
}

// out = norm(x) weight; norm(x) is rounded to x's dtype before it is scaled, as LlamaRMSNorm does.
template <typename X>
CLP_INLINE void norm_head(const X* x, int64_t size, const float* weight, float eps, float* out) {
  RowSum squares;
  for_row(size, CLP_BODY {
    const Vec v = lanes.read(x + d);
    squares.part[i] += v * v;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares.total() / (float)size + eps);
  for_row(size, CLP_BODY { lanes.write(out + d, rounded_to(x, lanes.read(x + d) * scale) * lanes.read(weight + d)); });
}

// Reads both halves before it writes them: `from` may be `to`.
template <typename From, typename To>
CLP_INLINE void rotate_head(const From* from, int64_t half, const float* cos, const float* sin, To* to) {
  for_row(half, CLP_BODY {
    const Vec low = lanes.read(from + d), high = lanes.read(from + half + d);
    lanes.write(to + d, low * lanes.read(cos + d) - high * lanes.read(sin + d));
    lanes.write(to + half + d, high * lanes.read(cos + half + d) + low * lanes.read(sin + half + d));
  });
}

template <typename X>
static void rotate_typed(const RotaryJob& job, const X*, int64_t m_begin, int64_t m_end, float* scratch) {
  const int64_t size = job.head_dim, half = size / 2;
  float *cos = scratch, *sin = scratch + size, *normed = scratch + 2 * size;
  for (int64_t m = m_begin; m < m_end; m++) {
    const int64_t at = m % job.table_rows * size;
    with_type(job.table_dtype, job.cos, [&](const auto* table) { widen_row(table + at, size, cos); });
    with_type(job.table_dtype, job.sin, [&](const auto* table) { widen_row(table + at, size, sin); });
    X* heads = (X*)job.heads + m * job.H * size;
    for (int64_t h = 0; h < job.H; h++, heads += size) {
      if (job.norm_weight) {
        norm_head(heads, size, job.norm_weight, job.eps, normed);
        rotate_head(normed, half, cos, sin, heads);
      } else {
        rotate_head(heads, half, cos, sin, heads);
      }
    }
  }
}

static void rotate(const RotaryJob& job, int64_t m_begin, int64_t m_end, float* scratch) {
  with_type(job.dtype, job.heads, [&](const auto* x) { rotate_typed(job, x, m_begin, m_end, scratch); });
}
