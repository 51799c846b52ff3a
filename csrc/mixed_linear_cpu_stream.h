// Few rows, or rows that all differ: each weight is read once, for blocks of rows, into one sum per stream and row.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_vector.h.

constexpr int kStreams = 3;  // summed together: 3 streams by 4 rows fill AVX2's 16 registers, by 8 rows AVX-512's 32

// sums[j][i] = <stream j, x row i> over [0, D). Lanes and their order are the same for every R and J.
template <int R, int J, typename First, typename Rest>
CLP_INLINE void dot_products(const First* first, const Rest* rest, int64_t rest_step, const float* x, int64_t D,
                             float (&sums)[J][R]) {
  Vec sum[J][R];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sum[j][i] = splat(0.0f);
  }
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    Vec weight[J];
    weight[0] = load(first + d);
#pragma GCC unroll 8
    for (int j = 1; j < J; j++) weight[j] = load(rest + (j - 1) * rest_step + d);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Vec value = load(x + i * D + d);
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sum[j][i] += weight[j] * value;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      sums[j][i] = sum_lanes(sum[j][i]);
      for (int64_t t = d; t < D; t++) {
        const float weight = j == 0 ? load_one(first + t) : load_one(rest + (j - 1) * rest_step + t);
        sums[j][i] += weight * x[i * D + t];
      }
    }
  }
}

#ifdef CLP_DOT_BF16
// The same for bf16 weights and rows: products of pairs, summed in float32. Exact products; denormals count as zero.
template <int R, int J>
CLP_INLINE void dot_products(const Bf16* first, const Bf16* rest, int64_t rest_step, const Bf16* x, int64_t D,
                             float (&sums)[J][R]) {
  constexpr int64_t pairs = 2 * kWidth;
  __m512 sum[J][R];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sum[j][i] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < D; d += pairs) {
    // Lanes past D are loaded as zero.
    const __mmask32 valid = D - d >= pairs ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << (D - d)) - 1);
    __m512bh weight[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const Bf16* from = j == 0 ? first + d : rest + (j - 1) * rest_step + d;
      weight[j] = (__m512bh)_mm512_maskz_loadu_epi16(valid, from);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(valid, x + i * D + d);
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], weight[j], value);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sums[j][i] = sum_lanes((Vec)sum[j][i]);
  }
}
#endif

// y of R rows at output n, from streams [k, k + J) of the copies, with the base before them where `first` is it.
template <int R, int J, typename First, typename Rest, typename X>
static __attribute__((noinline)) void stream_block(const StreamJob& job, const X* x, int64_t m, const First* first,
                                                   bool first_is_base, const Rest* rest, int64_t k, float* y) {
  float sums[J][R];
  const Weights& w = job.weights;
  dot_products<R, J>(first, rest, w.D, x + m * w.D, w.D, sums);
  for (int i = 0; i < R; i++) {
    const float* c = job.rows.c + job.rows.row_map[m + i] * w.K + k;
    if (!first_is_base) sums[0][i] *= *c++;
    for (int j = 1; j < J; j++) sums[0][i] += c[j - 1] * sums[j][i];
    y[i] += sums[0][i];
  }
}

template <int R, typename Base, typename Delta, typename X>
static void stream_rows(const StreamJob& job, const X* x, int64_t n, int64_t m) {
  const Weights& w = job.weights;
  const Delta* deltas = (const Delta*)w.deltas + n * w.K * w.D;
  float y[R];
  for (int i = 0; i < R; i++) {
    const float* c = job.rows.c + job.rows.row_map[m + i] * w.K;
    y[i] = job.bias ? job.bias[n] : 0.0f;
    for (int64_t k = 0; job.bias_deltas && k < w.K; k++) y[i] += c[k] * job.bias_deltas[n * w.K + k];
  }
  int64_t k = 0;
  if (w.base) {
    const Base* base = (const Base*)w.base + n * w.D;
    if (w.K == 1) {
      stream_block<R, 2>(job, x, m, base, true, deltas, 0, y);
      k = 1;
    } else {
      stream_block<R, 3>(job, x, m, base, true, deltas, 0, y);
      k = 2;
    }
  }
  for (; k < w.K; k += kStreams) {
    const Delta *first = deltas + k * w.D, *rest = first + w.D;
    switch (w.K - k) {
      case 1:
        stream_block<R, 1>(job, x, m, first, false, rest, k, y);
        break;
      case 2:
        stream_block<R, 2>(job, x, m, first, false, rest, k, y);
        break;
      default:
        stream_block<R, 3>(job, x, m, first, false, rest, k, y);
    }
  }
  for (int i = 0; i < R; i++) {
    const int64_t at = (m + i) * w.N + n;
    if (job.y_dtype == Dtype::f32) {
      store_one((float*)job.y + at, y[i]);
    } else {
      store_one((Bf16*)job.y + at, y[i]);
    }
  }
}

template <typename Base, typename Delta, typename X>
static void stream_typed(const StreamJob& job, const X* x, int64_t n_begin, int64_t n_end) {
  // Rows in groups that stay in the second-level cache beside the weights of one output.
  constexpr int64_t kGroup = 32;
  for (int64_t group = 0; group < job.rows.M; group += kGroup) {
    const int64_t end = job.rows.M - group < kGroup ? job.rows.M : group + kGroup;
    for (int64_t n = n_begin; n < n_end; n++) {
      int64_t m = group;
      for (; m + kStreamRows <= end; m += kStreamRows) stream_rows<kStreamRows, Base, Delta>(job, x, n, m);
      if constexpr (kStreamRows > 4) {
        for (; m + 4 <= end; m += 4) stream_rows<4, Base, Delta>(job, x, n, m);
      }
      for (; m + 2 <= end; m += 2) stream_rows<2, Base, Delta>(job, x, n, m);
      for (; m < end; m++) stream_rows<1, Base, Delta>(job, x, n, m);
    }
  }
}

static void stream(const StreamJob& job, int64_t n_begin, int64_t n_end) {
  const bool wide_base = job.weights.base_dtype == Dtype::f32, wide_deltas = job.weights.deltas_dtype == Dtype::f32;
#ifdef CLP_DOT_BF16
  if (job.x_bf16 && !wide_base && !wide_deltas) {
    stream_typed<Bf16, Bf16>(job, job.x_bf16, n_begin, n_end);
    return;
  }
#endif
  const auto run = wide_deltas ? (wide_base ? stream_typed<float, float, float> : stream_typed<Bf16, float, float>)
                               : (wide_base ? stream_typed<float, Bf16, float> : stream_typed<Bf16, Bf16, float>);
  run(job, job.x, n_begin, n_end);
}
