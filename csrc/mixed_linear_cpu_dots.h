// Few rows of x: dot products along D, one sum for each stream.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_mix.h.

constexpr int64_t kMaxDots = 8;
constexpr int kDotStreams = 3;  // by 4 rows of x they fill AVX2's 16 registers
constexpr int kDotRows = 4;

// Floats of x that are read again and again: 16 KiB, half a first-level cache, which the weights pass through as well.
constexpr int64_t kDotFloats = 4096;

// Terms [begin, end) of rows of weights, `next` those that are read after these: they are fetched ahead.
template <typename Weight>
struct DotRows {
  const Weight *w[kDotStreams], *next[kDotStreams];
};

// out[j * step + i] = or += <w[j], x_i>, a row of x every x_step floats. Two sums for each where registers allow it, so
// that additions wait less for one another.
template <int J, int R, typename Weight>
CLP_INLINE void dot_block(const DotRows<Weight>& rows, const float* x, int64_t x_step, int64_t length, bool add,
                          float* out, int64_t step) {
  // Lines fetched ahead. A row of 16-bit weights is soon over, and sums of lanes follow each: with 16 lines instead of
  // 8 bf16 takes .75 to .97 of the time (K = 2 to 4, 1 to 4 rows, 2048 x 2048, two Zen 3 cores).
  constexpr int64_t line = 64 / sizeof(Weight), ahead = (sizeof(Weight) == 4 ? 8 : 16) * line;
  constexpr int U = J * R * 2 <= 12 && line >= 2 * kWidth ? 2 : 1;
  Vec sum[U][J][R];
#pragma GCC unroll 2
  for (int u = 0; u < U; u++) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) sum[u][j][i] = splat(0.0f);
    }
  }
  int64_t d = 0;
  for (; d + line <= length; d += line) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      __builtin_prefetch(d + ahead < length ? rows.w[j] + d + ahead : rows.next[j] + d + ahead - length);
    }
#pragma GCC unroll 8
    for (int at = 0; at < line; at += kWidth) {
      Vec weight[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) weight[j] = load(rows.w[j] + d + at);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Vec value = load(x + i * x_step + d + at);
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) sum[at / kWidth % U][j][i] += weight[j] * value;
      }
    }
  }
  float totals[J * R + kWidth];
#pragma GCC unroll 8
  for (int first = 0; first < J * R; first += kWidth) {
    Vec vectors[kWidth];
#pragma GCC unroll 16
    for (int at = 0; at < kWidth; at++) {
      const int j = (first + at) / R, i = (first + at) % R;
      vectors[at] = first + at >= J * R ? splat(0.0f) : U == 2 ? sum[0][j][i] + sum[U - 1][j][i] : sum[0][j][i];
    }
    store(totals + first, sum_lanes_of_all(vectors));
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      float total = totals[j * R + i];
      for (int64_t t = d; t < length; t++) total += load_one(rows.w[j] + t) * x[i * x_step + t];
      out[j * step + i] = add ? out[j * step + i] + total : total;
    }
  }
}

#ifdef CLP_DOT_BF16
// The same for bf16 weights and rows: products of pairs, summed in float32. Exact products; denormals count as zero.
template <int J, int R>
CLP_INLINE void dot_block(const DotRows<Bf16>& rows, const Bf16* x, int64_t x_step, int64_t length, bool add,
                          float* out, int64_t step) {
  constexpr int64_t pairs = 2 * kWidth;
  __m512 sum[J][R];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sum[j][i] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < length; d += pairs) {
    // Lanes past the end are loaded as zero.
    const __mmask32 valid = length - d >= pairs ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << (length - d)) - 1);
    __m512bh weight[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) weight[j] = (__m512bh)_mm512_maskz_loadu_epi16(valid, rows.w[j] + d);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(valid, x + i * x_step + d);
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], weight[j], value);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const float total = sum_lanes((Vec)sum[j][i]);
      out[j * step + i] = add ? out[j * step + i] + total : total;
    }
  }
}
#endif

template <int J, typename Weight, typename X>
static __attribute__((noinline)) void dot_rows(const DotRows<Weight>& rows, const X* x, int64_t count, int64_t x_step,
                                               int64_t length, bool add, float* out, int64_t step) {
  for (; count >= kDotRows; count -= kDotRows, x += kDotRows * x_step, out += kDotRows) {
    dot_block<J, kDotRows>(rows, x, x_step, length, add, out, step);
  }
  if (count == 3) dot_block<J, 3>(rows, x, x_step, length, add, out, step);
  if (count == 2) dot_block<J, 2>(rows, x, x_step, length, add, out, step);
  if (count == 1) dot_block<J, 1>(rows, x, x_step, length, add, out, step);
}

// Row `row` of weights: base rows n, or those of the listed copies, (n, copy) with the copy running faster. Rows from
// `count` on are those of the outputs that follow.
template <typename Weight>
struct WeightRows {
  const Weight* first;
  int64_t count, D, K;
  const int32_t* copies;
  int64_t num_copies;

  CLP_INLINE_MEMBER const Weight* at(int64_t row) const {
    return copies ? first + (row / num_copies * K + copies[row % num_copies]) * D : first + row * D;
  }
};

// out[row * step + i] = <row, x_i> for `count` rows of x; of all weights one piece of terms after the other.
template <typename Weight, typename X>
static void all_dots(const WeightRows<Weight>& weights, const X* x, int64_t count, float* out, int64_t step) {
  const int64_t D = weights.D, piece = kDotFloats / count / 64 * 64;
  for (int64_t d = 0; d < D || d == 0; d += piece) {
    const int64_t length = D - d < piece ? D - d : piece;
    int64_t row = 0;
    for (; row + kDotStreams <= weights.count; row += kDotStreams) {
      DotRows<Weight> rows;
      const bool same_piece = row + 2 * kDotStreams <= weights.count, next_piece = !same_piece && d + length < D;
      for (int j = 0; j < kDotStreams; j++) {
        rows.w[j] = weights.at(row + j) + d;
        const Weight* ahead = weights.at(row + kDotStreams + j) + (same_piece ? d : 0);
        rows.next[j] = next_piece ? weights.at(j) + d + length : ahead;
      }
      dot_rows<kDotStreams>(rows, x + d, count, D, length, d > 0, out + row * step, step);
    }
    for (; row < weights.count; row++) {
      DotRows<Weight> rows;
      rows.w[0] = weights.at(row) + d;
      rows.next[0] = weights.at(row + 1) + d;
      dot_rows<1>(rows, x + d, count, D, length, d > 0, out + row * step, step);
    }
  }
}
