// Gradients of the deltas and of the coefficients, from one product G_s = dy_s^T x_s for each segment.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_gemm.h.

// <delta[n0 .. n0 + rows, k, d0 .. d0 + columns], tile>
template <typename Delta>
static double inner_product(const Weights& w, int64_t k, int64_t n0, int64_t rows, int64_t d0, int64_t columns,
                            const float* tile) {
  double total = 0.0;
  for (int64_t i = 0; i < rows; i++, tile += kColumns) {
    const Delta* delta = (const Delta*)w.deltas + ((n0 + i) * w.K + k) * w.D + d0;
    if (columns == kColumns) {
      total += sum_lanes(load(delta) * load(tile) + load(delta + kWidth) * load(tile + kWidth));
    } else {
      for (int64_t j = 0; j < columns; j++) total += load_one(delta + j) * tile[j];
    }
  }
  return total;
}

// One block of kRows outputs by kColumns inputs: its sums over all segments in `totals` [2, K, kRows, kColumns], the second
// half of which sums short segments until they make up kChain rows: many of them are no long chain either.
template <typename Delta>
static void grad_block(const GradJob& job, int64_t item, int64_t block, const float* panel, float* totals) {
  const Weights& w = job.weights;
  const int64_t d0 = item * kColumns, n0 = block * kRows;
  const int64_t columns = w.D - d0 < kColumns ? w.D - d0 : kColumns, rows = w.N - n0 < kRows ? w.N - n0 : kRows;
  const int64_t first = job.only_copy < 0 ? 0 : job.only_copy, last = job.only_copy < 0 ? w.K : job.only_copy + 1;
  const int64_t tile_size = kRows * kColumns;
  alignas(64) float tile[kRows * kColumns];
  float* chain = totals + w.K * tile_size;
  int64_t chain_rows = 0;
  for (int64_t i = 0; i < 2 * w.K * tile_size; i++) totals[i] = 0.0f;
  for (int64_t g = 0; g < job.rows.num_segments; g++) {
    const Segment& segment = job.rows.segments[g];
    const int64_t length = segment.end - segment.begin;
    const float* dy = job.dy + (block * job.rows.M + segment.begin) * kRows;
    multiply<kRows, kRows>(dy, 1, panel + segment.begin * kColumns, length, tile);
    for (int64_t k = first; k < last; k++) {
      const float c = job.only_copy < 0 ? job.rows.c[segment.weighting * w.K + k] : 1.0f;
      float* total = (length < kChain ? chain : totals) + k * tile_size;
      for (int64_t i = 0; job.d_deltas && i < tile_size; i++) total[i] += c * tile[i];
      if (job.d_c) {
        job.d_c[(item * job.S + segment.weighting) * w.K + k] +=
            inner_product<Delta>(w, k, n0, rows, d0, columns, tile);
      }
    }
    if (length < kChain) chain_rows += length;
    const bool is_last = g + 1 == job.rows.num_segments;
    if (!job.d_deltas || chain_rows == 0 || (chain_rows < kChain && !is_last)) continue;
    chain_rows = 0;
    for (int64_t i = first * tile_size; i < last * tile_size; i++) {
      totals[i] += chain[i];
      chain[i] = 0.0f;
    }
  }
  if (!job.d_deltas) return;
  for (int64_t k = first; k < last; k++) {
    for (int64_t i = 0; i < rows; i++) {
      Delta* out = (Delta*)job.d_deltas + ((n0 + i) * w.K + k) * w.D + d0;
      for (int64_t j = 0; j < columns; j++) store_one(out + j, totals[k * tile_size + i * kColumns + j]);
    }
  }
}

static void grad(const GradJob& job, int64_t item_begin, int64_t item_end, float* scratch) {
  const Weights& w = job.weights;
  float* panel = scratch;
  float* totals = scratch + kColumns * job.rows.M;
  for (int64_t item = item_begin; item < item_end; item++) {
    const int64_t d0 = item * kColumns, columns = w.D - d0 < kColumns ? w.D - d0 : kColumns;
    for (int64_t m = 0; m < job.rows.M; m++) {
      const float* x = job.x + m * w.D + d0;
      for (int64_t j = 0; j < kColumns; j++) panel[m * kColumns + j] = j < columns ? x[j] : 0.0f;
    }
    const auto run = w.deltas_dtype == Dtype::f32 ? grad_block<float> : grad_block<Bf16>;
    for (int64_t block = 0; block * kRows < w.N; block++) run(job, item, block, panel, totals);
  }
}
