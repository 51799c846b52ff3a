// Panels of the mix, in float32 (the mix is never rounded below it), and the register-blocked product with them.
//
// A panel is [length, kColumns], kColumns = 2 vectors. Included once per instruction set, inside that set's namespace.

constexpr int64_t kColumns = 2 * kWidth;

// Where a panel's values come from: an optional base and `copies` deltas.
template <typename Base, typename Delta>
struct Source {
  const Base* base;
  const Delta* deltas;
  int64_t copies, stride;  // stride: from the deltas of one output to the next
  int64_t N, D;
  const float* c;

  CLP_INLINE_MEMBER Vec mix(int64_t n, int64_t d) const {
    Vec sum = base ? load(base + n * D + d) : splat(0.0f);
    const Delta* delta = deltas + n * stride + d;
    for (int64_t k = 0; k < copies; k++) sum += load(delta + k * D) * c[k];
    return sum;
  }

  CLP_INLINE_MEMBER float mix_one(int64_t n, int64_t d) const {
    float sum = base ? load_one(base + n * D + d) : 0.0f;
    const Delta* delta = deltas + n * stride + d;
    for (int64_t k = 0; k < copies; k++) sum += load_one(delta + k * D) * c[k];
    return sum;
  }
};

// panel[d, j] = mix[n0 + j, d]; columns past N are zero.
template <typename Base, typename Delta>
static void pack_outputs(const Source<Base, Delta>& source, int64_t n0, float* panel) {
  const int64_t D = source.D;
  for (int64_t first = 0; first < kColumns; first += kWidth) {
    float* out = panel + first;
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kWidth; j++) {
        const int64_t n = n0 + first + j;
        rows[j] = n < source.N ? source.mix(n, d) : splat(0.0f);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) store(out + (d + i) * kColumns, rows[i]);
    }
    for (; d < D; d++) {
      for (int64_t j = 0; j < kWidth; j++) {
        const int64_t n = n0 + first + j;
        out[d * kColumns + j] = n < source.N ? source.mix_one(n, d) : 0.0f;
      }
    }
  }
}

// panel[n, j] = mix[n, d0 + j]; columns past D are zero.
template <typename Base, typename Delta>
static void pack_inputs(const Source<Base, Delta>& source, int64_t d0, float* panel) {
  const int64_t columns = source.D - d0 < kColumns ? source.D - d0 : kColumns;
  for (int64_t n = 0; n < source.N; n++) {
    float* out = panel + n * kColumns;
    if (columns == kColumns) {
      store(out, source.mix(n, d0));
      store(out + kWidth, source.mix(n, d0 + kWidth));
    } else {
      for (int64_t j = 0; j < kColumns; j++) out[j] = j < columns ? source.mix_one(n, d0 + j) : 0.0f;
    }
  }
}

template <typename Base, typename Delta>
static void pack_panel(const GemmJob& job, int64_t first_column, const float* c, float* panel) {
  const Weights& w = job.weights;
  Source<Base, Delta> source{(const Base*)w.base, (const Delta*)w.deltas, w.K, w.K * w.D, w.N, w.D, c};
  const auto pack = job.columns_are_inputs ? pack_inputs<Base, Delta> : pack_outputs<Base, Delta>;
  if (!job.concatenated) {
    pack(source, first_column, panel);
    return;
  }
  const int64_t step = kColumns * (job.columns_are_inputs ? w.N : w.D);
  const float one = 1.0f;
  source.c = &one;
  if (w.base) {
    source.copies = 0;
    pack(source, first_column, panel);
    panel += step;
  }
  source.base = nullptr;
  source.copies = 1;
  for (int64_t k = 0; k < w.K; k++, panel += step) {
    source.deltas = (const Delta*)w.deltas + k * w.D;
    pack(source, first_column, panel);
  }
}

// Terms that are added one by one. The sums of such blocks are added in a second sum: a chain over all n terms errs by
// sqrt(n) roundings of a partial sum, and by 2 to 5 times what torch's product does (n = 576 to 2048). Measured with AVX2 on
// one Zen 3 core: blocks of 128 cost 1 % of the product's time and err less than torch does, blocks of 64 cost 4 %.
constexpr int64_t kChain = 128;

// tile[i, :] = sum_t a(i, t) panel[t, :] for R rows; a(i, t) = a[i * row_step + t * kStep]. Each sum runs over blocks of kChain
// steps t in order, so its bits do not depend on R, on the row's place in a block, or on the number of threads.
template <int R, int64_t kStep>
static __attribute__((noinline)) void multiply(const float* a, int64_t row_step, const float* panel, int64_t length,
                                               float* tile) {
  bool is_first = true;
  do {
    const int64_t steps = length < kChain ? length : kChain;
    Vec sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) sum[i][0] = sum[i][1] = splat(0.0f);
    for (int64_t t = 0; t < steps; t++) {
      const Vec left = load(panel), right = load(panel + kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        const Vec value = splat(a[i * row_step]);
        sum[i][0] += value * left;
        sum[i][1] += value * right;
      }
      a += kStep;
      panel += kColumns;
    }
    if (!is_first) {
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        sum[i][0] += load(tile + i * kColumns);
        sum[i][1] += load(tile + i * kColumns + kWidth);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      store(tile + i * kColumns, sum[i][0]);
      store(tile + i * kColumns + kWidth, sum[i][1]);
    }
    is_first = false;
    length -= steps;
  } while (length > 0);
}

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, float*);

template <int R>
static Multiply multiply_for(int64_t rows) {
  if constexpr (R == 1) {
    return multiply<1, 1>;
  } else {
    return rows >= R ? multiply<R, 1> : multiply_for<R - 1>(rows);
  }
}

template <typename Out>
static void store_tile(const GemmJob& job, const float* tile, int64_t staged, int64_t num_rows, int64_t first_column) {
  const int64_t columns = job.columns - first_column < kColumns ? job.columns - first_column : kColumns;
  const int64_t K = job.weights.K;
  for (int64_t i = 0; i < num_rows; i++, tile += kColumns) {
    const int64_t row = job.rows.order ? job.rows.order[staged + i] : staged + i;
    Out* out = (Out*)job.y + row * job.columns + first_column;
    if (!job.bias && !job.bias_deltas) {
      for (int64_t j = 0; j < columns; j++) store_one(out + j, tile[j]);
      continue;
    }
    const float* c = job.rows.c + job.rows.row_map[row] * K;
    for (int64_t j = 0; j < columns; j++) {
      const int64_t n = first_column + j;
      float value = tile[j] + (job.bias ? job.bias[n] : 0.0f);
      for (int64_t k = 0; job.bias_deltas && k < K; k++) value += c[k] * job.bias_deltas[n * K + k];
      store_one(out + j, value);
    }
  }
}

template <typename Base, typename Delta>
static void gemm_typed(const GemmJob& job, int64_t item_begin, int64_t item_end, float* panel) {
  const int64_t panels = (job.columns + kColumns - 1) / kColumns;
  alignas(64) float tile[kRows * kColumns], one_stream[kRows * kColumns];
  // Streams one above the other are summed each for itself: one chain over them all would be longer than any of torch's.
  const int64_t streams = job.concatenated ? job.weights.K + (job.weights.base ? 1 : 0) : 1;
  const int64_t length = streams > 0 ? job.length / streams : 0;
  for (int64_t item = item_begin; item < item_end; item++) {
    const int64_t first_column = item % panels * kColumns;
    const int64_t chunk_begin = item / panels * job.row_chunk;
    const int64_t chunk_end = chunk_begin + job.row_chunk;
    for (int64_t g = 0; g < job.rows.num_segments; g++) {
      const Segment& segment = job.rows.segments[g];
      const int64_t begin = segment.begin > chunk_begin ? segment.begin : chunk_begin;
      const int64_t end = segment.end < chunk_end ? segment.end : chunk_end;
      if (begin >= end) continue;
      pack_panel<Base, Delta>(job, first_column, job.rows.c + segment.weighting * job.weights.K, panel);
      for (int64_t m = begin; m < end; m += kRows) {
        const int64_t num_rows = end - m < kRows ? end - m : kRows;
        const Multiply product = multiply_for<kRows>(num_rows);
        const float* a = job.a + m * job.length;
        product(a, job.length, panel, length, tile);
        for (int64_t stream = 1; stream < streams; stream++) {
          product(a + stream * length, job.length, panel + stream * length * kColumns, length, one_stream);
          for (int64_t i = 0; i < num_rows * kColumns; i++) tile[i] += one_stream[i];
        }
        const auto finish = job.y_dtype == Dtype::f32 ? store_tile<float> : store_tile<Bf16>;
        finish(job, tile, m, num_rows, first_column);
      }
    }
  }
}

static void gemm(const GemmJob& job, int64_t item_begin, int64_t item_end, float* panel) {
  const bool wide_base = job.weights.base_dtype == Dtype::f32, wide_deltas = job.weights.deltas_dtype == Dtype::f32;
  const auto run = wide_deltas ? (wide_base ? gemm_typed<float, float> : gemm_typed<Bf16, float>)
                               : (wide_base ? gemm_typed<float, Bf16> : gemm_typed<Bf16, Bf16>);
  run(job, item_begin, item_end, panel);
}
