// The forward for few rows, rows that all differ, and batch-invariant calls: rows of weights as they lie in memory,
// times x.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_panels.h.

// Products of rows of weights with the few rows of x, by dots.
template <typename Weight>
CLP_INLINE void dots(const RowsJob& job, const WeightRows<Weight>& weights, float* out, int64_t step) {
  all_dots(weights, job.x, step, out, step);
}

CLP_INLINE void dots(const RowsJob& job, const WeightRows<Bf16>& weights, float* out, int64_t step) {
#ifdef CLP_DOT_BF16
  if (job.x_bf16) return all_dots(weights, job.x_bf16, step, out, step);
#endif
  all_dots(weights, job.x_even_first, step, out, step);
}

// sums[n - n0, :] = the products with the mix of each panel, mixed for one panel after the other.
static void mixed_products(const RowsJob& job, int64_t n0, int64_t count, float* sums, float* mixed, int64_t step) {
  const Weights& w = job.weights;
  const WeightRows<float> rows{mixed, count, w.D, 1, nullptr, 1};
  for (int64_t p = 0; p < job.num_panels;) {
    int64_t end = p + 1;
    while (end < job.num_panels && job.panels[end].mix == job.panels[p].mix) end++;
    mix(w, *job.panels[p].mix, n0, n0 + count, 0, w.D, mixed, w.D);
    all_products(rows, job.panels + p, end - p, job.x + p * w.D * kColumns, sums + p * kColumns, step);
    p = end;
  }
}

template <typename Weight>
CLP_INLINE WeightRows<Weight> base_rows(const Weight* base, int64_t n0, int64_t count, int64_t D) {
  return {base + n0 * D, count, D, 1, nullptr, 1};
}

template <typename Weight>
CLP_INLINE WeightRows<Weight> copy_rows(const Weight* deltas, int64_t n0, int64_t count, const Weights& w,
                                        const Mix& streams) {
  return {deltas + n0 * w.K * w.D, count * streams.count, w.D, w.K, streams.copies, streams.count};
}

// sums[n - n0, :] = the products with the base, plus each copy's times the coefficient of the row of x.
static void stream_products(const RowsJob& job, int64_t n0, int64_t count, float* sums, float* copy_sums,
                            int64_t step) {
  const Weights& w = job.weights;
  const Mix& streams = job.streams;
  if (streams.base) {
    with_type(w.base_dtype, w.base, [&](const auto* base) {
      all_products(base_rows(base, n0, count, w.D), job.panels, job.num_panels, job.x, sums, step);
    });
  } else {
    __builtin_memset(sums, 0, count * step * 4);
  }
  with_type(w.deltas_dtype, w.deltas, [&](const auto* deltas) {
    all_products(copy_rows(deltas, n0, count, w, streams), job.panels, job.num_panels, job.x, copy_sums, step);
  });
  for (int64_t n = 0; n < count; n++, sums += step) {
    for (int64_t a = 0; a < streams.count; a++, copy_sums += step) {
      const float* c = job.c + streams.copies[a] * step;
      for (int64_t i = 0; i < step; i += kWidth) store(sums + i, load(sums + i) + load(c + i) * load(copy_sums + i));
    }
  }
}

// The same for few rows, sums[(n - n0) * rows + i], and the bias. One by one: a vector of sums that were stored one by
// one waits for all of them.
static void dot_products(const RowsJob& job, int64_t n0, int64_t count, float* sums, float* copy_sums) {
  const Weights& w = job.weights;
  const Mix& streams = job.streams;
  const int64_t rows = job.panels[0].rows;
  if (streams.base) {
    with_type(w.base_dtype, w.base, [&](const auto* base) { dots(job, base_rows(base, n0, count, w.D), sums, rows); });
  } else {
    __builtin_memset(sums, 0, count * rows * 4);
  }
  with_type(w.deltas_dtype, w.deltas,
            [&](const auto* deltas) { dots(job, copy_rows(deltas, n0, count, w, streams), copy_sums, rows); });
  for (int64_t n = n0; n < n0 + count; n++, sums += rows, copy_sums += streams.count * rows) {
    for (int64_t i = 0; i < rows; i++) {
      float sum = sums[i];
      for (int64_t a = 0; a < streams.count; a++) {
        sum += job.c[streams.copies[a] * kColumns + i] * copy_sums[a * rows + i];
      }
      float bias = job.bias ? job.bias[n] : 0.0f;
      for (int64_t k = 0; job.bias_deltas && k < w.K; k++) {
        bias += job.c[k * kColumns + i] * job.bias_deltas[n * w.K + k];
      }
      sums[i] = sum + bias;
    }
  }
}

static void add_bias(const RowsJob& job, int64_t n0, int64_t count, float* sums, int64_t step) {
  const int64_t K = job.weights.K;
  for (int64_t n = n0; n < n0 + count; n++, sums += step) {
    for (int64_t i = 0; i < step; i += kWidth) {
      Vec bias = splat(job.bias ? job.bias[n] : 0.0f);
      for (int64_t k = 0; job.bias_deltas && k < K; k++) {
        bias += load(job.c + k * step + i) * job.bias_deltas[n * K + k];
      }
      store(sums + i, load(sums + i) + bias);
    }
  }
}

template <typename Out>
CLP_INLINE void store_outputs(const RowsJob& job, const Out* y, int64_t n0, int64_t count, const float* sums,
                              int64_t step) {
  for (int64_t p = 0; p < job.num_panels; p++) {
    for (int64_t i = 0; i < job.panels[p].rows; i++) {
      const int64_t at = job.panels[p].first + i;
      Out* out = (Out*)y + (job.order ? job.order[at] : at) * job.weights.N + n0;
      for (int64_t n = 0; n < count; n++) store_one(out + n, sums[n * step + p * kColumns + i]);
    }
  }
}

static void rows(const RowsJob& job, int64_t group_begin, int64_t group_end, float* scratch) {
  const int64_t step = job.dots ? job.panels[0].rows : job.num_panels * kColumns;
  float *sums = scratch, *copy_sums = sums + kRows * step, *mixed = copy_sums + kRows * (job.streams.count + 1) * step;
  // Columns past a panel's rows, or past its half, are summed and never stored: they must be numbers.
  if (!job.dots) __builtin_memset(sums, 0, (mixed - sums) * 4);
  for (int64_t group = group_begin; group < group_end; group++) {
    const int64_t n0 = group * kRows, count = job.weights.N - n0 < kRows ? job.weights.N - n0 : kRows;
    if (job.dots) {
      dot_products(job, n0, count, sums, copy_sums);
    } else if (job.panels[0].mix) {
      mixed_products(job, n0, count, sums, mixed, step);
    } else {
      stream_products(job, n0, count, sums, copy_sums, step);
    }
    if (!job.dots && (job.bias || job.bias_deltas)) add_bias(job, n0, count, sums, step);
    with_type(job.y_dtype, job.y, [&](const auto* y) { store_outputs(job, y, n0, count, sums, step); });
  }
}
