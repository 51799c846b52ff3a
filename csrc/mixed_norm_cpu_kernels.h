// The kernels of mixed_norm for one instruction set; included by mixed_rows_cpu_kernels.h.
//
// A row is read from memory once and is in the first-level cache for the passes after that.

CLP_INLINE Vec rounded_to(const float*, Vec v) { return v; }
CLP_INLINE Vec rounded_to(const Bf16*, Vec v) { return (Vec)round_to_bf16(v); }
CLP_INLINE Vec rounded_to(const Half*, Vec v) {
  Half half[kWidth];
  store(half, v);
  return load(half);
}

// weight + sum_k c[k] delta_k: in `out`, or `weight` itself where every coefficient is 0. Such copies are not read.
static const float* mix_vector(const float* weight, const float* deltas, const float* c, int64_t K, int64_t D,
                               float* out) {
  const float* sum = weight;
  for (int64_t k = 0; k < K; k++) {
    if (c[k] == 0.0f) continue;
    for_row(D, CLP_BODY { lanes.write(out + d, lanes.read(sum + d) + c[k] * lanes.read(deltas + k * D + d)); });
    sum = out;
  }
  return sum;
}

template <typename X>
CLP_INLINE float mean_of_row(const NormRows& rows, const X* x, int64_t D) {
  if (!rows.is_centered) return 0.0f;
  RowSum sum;
  for_row(D, CLP_BODY { sum.part[i] += lanes.read(x + d); });
  return sum.total() / (float)D;
}

CLP_INLINE float inverse_deviation(const NormRows& rows, float sum_of_squares, int64_t D) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / (float)D + rows.eps);
}

template <typename X, bool cast>
static void norm_row(const NormRows& rows, const X* x, int64_t D, const float* weight, const float* bias, X* y) {
  const float mean = mean_of_row(rows, x, D);
  RowSum squares;
  for_row(D, CLP_BODY {
    const Vec centered = lanes.only(lanes.read(x + d) - mean);
    squares.part[i] += centered * centered;
  });
  const float scale = inverse_deviation(rows, squares.total(), D);
  const auto normalised = [&](int64_t d, auto lanes) __attribute__((always_inline)) {
    const Vec n = (lanes.read(x + d) - mean) * scale;
    return cast ? rounded_to(x, n) : n;
  };
  if (bias) {
    for_row(D, CLP_BODY { lanes.write(y + d, normalised(d, lanes) * lanes.read(weight + d) + lanes.read(bias + d)); });
  } else {
    for_row(D, CLP_BODY { lanes.write(y + d, normalised(d, lanes) * lanes.read(weight + d)); });
  }
}

template <typename X>
static void norm_typed(const NormJob& job, const X*, int64_t m_begin, int64_t m_end, float* scratch) {
  const NormParameters& p = job.parameters;
  const auto run = job.rows.cast_before_scale ? norm_row<X, true> : norm_row<X, false>;
  const float *weight = nullptr, *bias = nullptr;
  for (int64_t m = m_begin; m < m_end; m++) {
    const int32_t s = job.rows.row_map[m];
    if (m == m_begin || s != job.rows.row_map[m - 1]) {
      const float* c = job.rows.c + s * p.K;
      weight = mix_vector(p.weight, p.weight_deltas, c, p.K, p.D, scratch);
      bias = p.bias_deltas ? mix_vector(p.bias, p.bias_deltas, c, p.K, p.D, scratch + p.D) : p.bias;
    }
    run(job.rows, (const X*)job.rows.x + m * p.D, p.D, weight, bias, (X*)job.y + m * p.D);
  }
}

static void norm(const NormJob& job, int64_t m_begin, int64_t m_end, float* scratch) {
  with_type(job.rows.dtype, job.rows.x, [&](const auto* x) { norm_typed(job, x, m_begin, m_end, scratch); });
}

// Adds dy n to weight_run and dy to bias_run, where they are asked for, and writes dx:
// dx = scale (g - mean(g) - xhat mean(g xhat)), g = dy weight, xhat = (x - mean) scale; RMSNorm without the mean of g.
template <typename X, bool cast>
static void norm_grad_row(const NormRows& rows, const X* x, const X* dy, int64_t D, const float* weight,
                          float* weight_run, float* bias_run, X* dx) {
  const float mean = mean_of_row(rows, x, D);
  RowSum squares, gradients, products;
  for_row(D, CLP_BODY {
    const Vec centered = lanes.only(lanes.read(x + d) - mean);
    const Vec g = lanes.read(dy + d) * lanes.read(weight + d);
    squares.part[i] += centered * centered;
    gradients.part[i] += g;
    products.part[i] += g * centered;
  });
  const float scale = inverse_deviation(rows, squares.total(), D);
  if (weight_run) {
    for_row(D, CLP_BODY {
      Vec n = (lanes.read(x + d) - mean) * scale;
      if (cast) n = rounded_to(x, n);
      lanes.write(weight_run + d, lanes.read(weight_run + d) + lanes.read(dy + d) * n);
    });
  }
  if (bias_run) add_scaled(1.0f, dy, D, bias_run);
  if (dx) {
    const float shift = rows.is_centered ? gradients.total() / (float)D : 0.0f;
    const float along_x = products.total() * scale * scale / (float)D;
    for_row(D, CLP_BODY {
      const Vec g = lanes.read(dy + d) * lanes.read(weight + d);
      lanes.write(dx + d, ((g - shift) - (lanes.read(x + d) - mean) * along_x) * scale);
    });
  }
}

// The sums of one parameter's gradient: over a run of rows of one weighting, a chunk of rows, a block. Null: not asked
// for.
struct NormSums {
  const float* deltas;  // [K, D] or null
  float* run;           // [D]
  float* chunk;         // [K + 1, D] or null
  float* block;         // [K + 1, D] or null
  int64_t K, D;

  CLP_INLINE_MEMBER void clear() const {
    if (run) clear_row(run, D);
    if (!block) return;
    clear_row(chunk, (K + 1) * D);
    clear_row(block, (K + 1) * D);
  }

  CLP_INLINE_MEMBER void end_run(const float* c, double* terms) const {
    if (!run) return;
    if (block) add_scaled(1.0f, run, D, chunk);
    for (int64_t k = 0; k < K; k++) {
      if (block) add_scaled(c[k], run, D, chunk + (k + 1) * D);
      if (terms && deltas) terms[k] += dot_row(run, deltas + k * D, D);
    }
    clear_row(run, D);
  }

  CLP_INLINE_MEMBER void end_chunk() const {
    if (!block) return;
    add_scaled(1.0f, chunk, (K + 1) * D, block);
    clear_row(chunk, (K + 1) * D);
  }
};

template <typename X>
static void norm_grad_block(const NormGradJob& job, const X*, int64_t begin, int64_t end, const NormSums& weight_sums,
                            const NormSums& bias_sums, float* mixed) {
  const NormParameters& p = job.parameters;
  const auto run = job.rows.cast_before_scale ? norm_grad_row<X, true> : norm_grad_row<X, false>;
  const float* weight = nullptr;
  for (int64_t m = begin; m < end; m++) {
    const int32_t s = job.rows.row_map[m];
    const float* c = job.rows.c + s * p.K;
    if (m == begin || s != job.rows.row_map[m - 1]) {
      weight = mix_vector(p.weight, p.weight_deltas, c, p.K, p.D, mixed);
    }
    run(job.rows, (const X*)job.rows.x + m * p.D, (const X*)job.dy + m * p.D, p.D, weight, weight_sums.run,
        bias_sums.run, job.dx ? (X*)job.dx + m * p.D : nullptr);
    const bool ends_chunk = (m + 1 - begin) % kNormChunk == 0 || m + 1 == end;
    if (ends_chunk || job.rows.row_map[m + 1] != s) {
      double* terms = job.terms ? job.terms + m * p.K : nullptr;
      weight_sums.end_run(c, terms);
      bias_sums.end_run(c, terms);
    }
    if (ends_chunk) {
      weight_sums.end_chunk();
      bias_sums.end_chunk();
    }
  }
}

static void norm_grad(const NormGradJob& job, int64_t block_begin, int64_t block_end, float* scratch) {
  const NormParameters& p = job.parameters;
  const int64_t D = p.D, size = (p.K + 1) * D;
  float *mixed = scratch, *runs = mixed + D, *chunks = runs + 2 * D;
  const bool has_bias_terms = job.terms && p.bias_deltas;
  for (int64_t b = block_begin; b < block_end; b++) {
    const int64_t begin = b * job.block_rows;
    const int64_t end = job.M - begin < job.block_rows ? job.M : begin + job.block_rows;
    const NormSums weight_sums{p.weight_deltas, job.weight_sums || job.terms ? runs : nullptr, chunks,
                               job.weight_sums ? job.weight_sums + b * size : nullptr, p.K, D};
    const NormSums bias_sums{p.bias_deltas, job.bias_sums || has_bias_terms ? runs + D : nullptr, chunks + size,
                             job.bias_sums ? job.bias_sums + b * size : nullptr, p.K, D};
    weight_sums.clear();
    bias_sums.clear();
    with_type(job.rows.dtype, job.rows.x,
              [&](const auto* x) { norm_grad_block(job, x, begin, end, weight_sums, bias_sums, mixed); });
  }
}
