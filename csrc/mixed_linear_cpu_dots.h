// Few rows of x: dot products along D, one sum for each stream.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_mix.h.

constexpr int64_t kMaxDots = 8;
constexpr int kDotStreams = kWidth == 16 ? 6 : 3;  // by 4 rows of x they fill AVX-512's 32 registers, AVX2's 16
constexpr int kDotRows = 4;
constexpr int64_t kLine16 = 32;  // 16-bit weights of a cache line

// Bytes of x that are read again and again. Half a first-level cache of 32 KiB, which the weights pass through as well;
// with AVX-512 two thirds of one of 48: 4 rows of 2048 float32 then read rows of weights as a whole (K = 4: .94 to .96
// of one row's bandwidth instead of .84 to .86, two Xeon threads).
constexpr int64_t kDotBytes = kWidth == 16 ? 32768 : 16384;

// Terms [begin, end) of rows of weights, `next` those that are read after these: they are fetched ahead.
template <typename Weight>
struct DotRows {
  const Weight *w[kDotStreams], *next[kDotStreams];
};

// Weights [at, at + kWidth) of a line, for products with as many floats of x as they lie in a row for dots.
template <typename Weight>
CLP_INLINE Vec weights_at(const Weight* line, int at) {
  return load(line + at);
}

// Two bfloat16s lie in 32 bits: the even one is a shift away from its float32, the odd one a mask. In their order it
// takes a shuffle too: so the even terms of x come first, then the odd ones (even_terms_first). Time of what it was in
// their order, 1 and 4 rows, 2048 and 576 inputs, weights in the second-level cache of one Xeon core: AVX-512 .85 to .99,
// AVX2 .79 to 1.0, SSE2 .42 to .75.
CLP_INLINE Vec weights_at(const Bf16* line, int at) {
  VecUint pairs;
  __builtin_memcpy(&pairs, line + at / kColumns * kColumns, sizeof(pairs));
  return (Vec)(at % kColumns ? pairs & 0xffff0000 : pairs << 16);
}

// In each 2 * kWidth terms of a row, up to the last whole line of 16-bit weights.
static void even_terms_first(const float* row, int64_t size, float* out) {
  int64_t d = 0;
  for (; d < size / kLine16 * kLine16; d += kColumns) {
    for (int i = 0; i < kWidth; i++) {
      out[d + i] = row[d + 2 * i];
      out[d + kWidth + i] = row[d + 2 * i + 1];
    }
  }
  for (; d < size; d++) out[d] = row[d];
}

// Products of kTerms weights with as many terms of x, added to the lanes of a sum.
template <typename Weight, typename X>
struct Products {
  static constexpr int kTerms = kWidth;
  typedef Vec Terms;
  CLP_INLINE_MEMBER static Terms of(const Weight* line, int at) { return weights_at(line, at); }
  CLP_INLINE_MEMBER static Terms of_x(const X* p) { return load(p); }
  CLP_INLINE_MEMBER static Vec add(Vec sum, Terms weight, Terms x) { return sum + weight * x; }
};

#ifdef CLP_DOT_BF16
// Of pairs, in float32. Exact; denormals count as zero.
template <>
struct Products<Bf16, Bf16> {
  static constexpr int kTerms = 2 * kWidth;
  typedef __m512bh Terms;
  CLP_INLINE_MEMBER static Terms of_x(const Bf16* p) { return (Terms)_mm512_loadu_si512(p); }
  CLP_INLINE_MEMBER static Terms of(const Bf16* line, int at) { return of_x(line + at); }
  CLP_INLINE_MEMBER static Vec add(Vec sum, Terms weight, Terms x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, weight, x);
  }
};
#endif

// out[j * step + i] = or += <w[j], x_i>, a row of x every x_step terms. Two sums for each where registers allow it, so
// that additions wait less for one another.
template <int J, int R, typename Weight, typename X>
CLP_INLINE void dot_block(const DotRows<Weight>& rows, const X* x, int64_t x_step, int64_t length, bool add,
                          float* out, int64_t step) {
  typedef Products<Weight, X> P;
  // Lines fetched ahead. A row of 16-bit weights is soon over, and sums of lanes follow each: with 16 lines instead of
  // 8 bf16 takes .75 to .97 of the time (K = 2 to 4, 1 to 4 rows, 2048 x 2048, two Zen 3 cores).
  // With AVX-512 float32 takes 16 as well: 4 rows by 3 streams 21.0 GB/s with 8 lines, 22.7 with 16, by 6 streams 24.0
  // (a loop that does nothing else, two Xeon threads).
  constexpr int64_t line = 64 / sizeof(Weight), ahead = (sizeof(Weight) == 4 && kWidth < 16 ? 8 : 16) * line;
  constexpr int U = J * R * 2 <= 12 && line >= 2 * P::kTerms ? 2 : 1;
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
    for (int at = 0; at < line; at += P::kTerms) {
      typename P::Terms weight[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) weight[j] = P::of(rows.w[j] + d, at);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const typename P::Terms value = P::of_x(x + i * x_step + d + at);
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
          Vec& total = sum[at / P::kTerms % U][j][i];
          total = P::add(total, weight[j], value);
        }
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
  if (d < length) {
    for (int j = 0; j < J; j++) {
      for (int i = 0; i < R; i++) {
        float& total = totals[j * R + i];
        for (int64_t t = d; t < length; t++) total += load_one(rows.w[j] + t) * load_one(x + i * x_step + t);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
    float* to = out + j * step;
    if (add) {
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) totals[j * R + i] += to[i];
    }
    __builtin_memcpy(to, totals + j * R, R * sizeof(float));
  }
}

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

// The same, one row after the other: `at` divides.
template <typename Weight>
struct RowWalk {
  WeightRows<Weight> rows;
  int64_t copy = 0;

  CLP_INLINE_MEMBER const Weight* next() {
    const Weight* row = rows.first + (rows.copies ? rows.copies[copy] * rows.D : 0);
    if (++copy == rows.num_copies) {
      copy = 0;
      rows.first += rows.K * rows.D;
    }
    return row;
  }
};

// out[row * step + i] = <row, x_i> for `count` rows of x; of all weights one piece of terms after the other.
template <typename Weight, typename X>
static void all_dots(const WeightRows<Weight>& weights, const X* x, int64_t count, float* out, int64_t step) {
  if (weights.count == 0) return;
  const int64_t D = weights.D, piece = kDotBytes / (count * (int64_t)sizeof(X)) / 64 * 64;
  for (int64_t d = 0; d < D || d == 0; d += piece) {
    const int64_t length = D - d < piece ? D - d : piece;
    RowWalk<Weight> left{weights};
    const Weight *first[kDotStreams], *then[kDotStreams];
    for (int j = 0; j < kDotStreams; j++) first[j] = then[j] = left.next();
    int64_t row = 0;
    for (; row + kDotStreams <= weights.count; row += kDotStreams) {
      DotRows<Weight> rows;
      const bool same_piece = row + 2 * kDotStreams <= weights.count, next_piece = !same_piece && d + length < D;
      for (int j = 0; j < kDotStreams; j++) {
        rows.w[j] = then[j] + d;
        then[j] = left.next();
        rows.next[j] = next_piece ? first[j] + d + length : then[j] + (same_piece ? d : 0);
      }
      dot_rows<kDotStreams>(rows, x + d, count, D, length, d > 0, out + row * step, step);
    }
    for (int j = 0; row < weights.count; row++, j++) {
      const DotRows<Weight> rows{{then[j] + d}, {then[j + 1] + d}};
      dot_rows<1>(rows, x + d, count, D, length, d > 0, out + row * step, step);
    }
  }
}
