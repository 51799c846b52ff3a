// The kernels of mixed_embedding for one instruction set; included by mixed_rows_cpu_kernels.h.

template <typename Base, typename Delta>
static void embed_typed(const EmbeddingJob& job, const Base*, const Delta*, int64_t m_begin, int64_t m_end) {
  const EmbeddingTables& t = job.tables;
  const int64_t K = t.K, D = t.D;
  for (int64_t m = m_begin; m < m_end; m++) {
    const int64_t id = job.ids[m];
    const Base* base = t.base ? (const Base*)t.base + id * D : nullptr;
    const Delta* deltas = (const Delta*)t.deltas + id * K * D;
    const float* c = job.c + job.row_map[m] * K;
    Base* y = (Base*)job.y + m * D;
    for_row(D, CLP_BODY {
      Vec sum = base ? lanes.read(base + d) : splat(0.0f);
      for (int64_t k = 0; k < K; k++) {
        if (c[k] != 0.0f) sum += c[k] * lanes.read(deltas + k * D + d);
      }
      lanes.write(y + d, sum);
    });
  }
}

static void embed(const EmbeddingJob& job, int64_t m_begin, int64_t m_end) {
  with_types(job.tables.base_dtype, job.tables.deltas_dtype,
             [&](const auto* base, const auto* deltas) { embed_typed(job, base, deltas, m_begin, m_end); });
}

// Rows of one id that are added one by one; the sums of such chains are added in a second sum.
constexpr int64_t kIdChain = 64;

// The sums of one id's rows, [K + 1, D]: of stream 0, the base's, and of the copies'.
template <typename Base>
static void sum_group(const EmbeddingGradJob& job, const IdGroup& group, int64_t first, int64_t last, float* sums,
                      float* chain) {
  const int64_t K = job.tables.K, D = job.tables.D, size = (K + 1) * D;
  clear_row(sums, size);
  for (int64_t begin = group.begin; begin < group.end; begin += kIdChain) {
    const int64_t end = group.end - begin < kIdChain ? group.end : begin + kIdChain;
    float* to = group.end - group.begin <= kIdChain ? sums : chain;
    if (to == chain) clear_row(chain, size);
    for (int64_t r = begin; r < end; r++) {
      const int64_t m = job.order[r];
      const float* c = job.c + job.row_map[m] * K;
      for (int64_t k = first; k < last; k++) {
        add_scaled(k == 0 ? 1.0f : c[k - 1], (const Base*)job.dy + m * D, D, to + k * D);
      }
    }
    if (to == chain) add_scaled(1.0f, chain, size, sums);
  }
}

template <typename To>
CLP_INLINE void write_row(const float* from, int64_t D, To* to) {
  for_row(D, CLP_BODY { lanes.write(to + d, lanes.read(from + d)); });
}

template <typename Base, typename Delta>
static void embed_grad_typed(const EmbeddingGradJob& job, const Base*, const Delta*, int64_t group_begin,
                             int64_t group_end, float* scratch) {
  const int64_t K = job.tables.K, D = job.tables.D;
  const int64_t first = job.d_base ? 0 : 1, last = job.d_deltas ? K + 1 : 1;
  for (int64_t g = group_begin; g < group_end; g++) {
    const IdGroup& group = job.groups[g];
    const Delta* deltas = (const Delta*)job.tables.deltas + group.id * K * D;
    for (int64_t r = group.begin; job.terms && r < group.end; r++) {
      const int64_t m = job.order[r];
      for (int64_t k = 0; k < K; k++) {
        job.terms[m * K + k] = dot_row((const Base*)job.dy + m * D, deltas + k * D, D);
      }
    }
    if (first >= last || group.id == job.padding_idx) continue;
    sum_group<Base>(job, group, first, last, scratch, scratch + (K + 1) * D);
    if (job.d_base) write_row(scratch, D, (Base*)job.d_base + group.id * D);
    const int64_t at = group.id * K * D;
    if (job.d_deltas && job.adds_deltas) {
      add_scaled(1.0f, scratch + D, K * D, (float*)job.d_deltas + at);
    } else if (job.d_deltas) {
      write_row(scratch + D, K * D, (Delta*)job.d_deltas + at);
    }
  }
}

static void embed_grad(const EmbeddingGradJob& job, int64_t group_begin, int64_t group_end, float* scratch) {
  with_types(job.tables.base_dtype, job.tables.deltas_dtype, [&](const auto* base, const auto* deltas) {
    embed_grad_typed(job, base, deltas, group_begin, group_end, scratch);
  });
}
