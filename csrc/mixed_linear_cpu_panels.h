// More rows of x: side by side in packed panels [length, kColumns], each weight broadcast over its row of the panel. A
// sum's order of terms depends on its length alone: its bits are the same in any batch and for any number of threads.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_dots.h.

// Terms that are added one by one. The sums of such blocks are added in a second sum: a chain over all n terms errs by
// sqrt(n) roundings of a partial sum, and by 2 to 5 times what torch's product does (n = 576 to 2048). Measured with
// AVX2 on one Zen 3 core: blocks of 128 cost 1 % of the product's time and err less than torch does, blocks of 64 cost
// 4 %.
constexpr int64_t kChain = 128;

// A block's rows of weights, kChain floats each, one after the other. Copied there even if they are floats: rows a
// power of two apart share few places in a cache, and have more addresses than there are registers (AVX-512, 504 rows
// of 2048 floats, one Xeon core: 135 GFLOP/s so, 125 in place; AVX2 was not measured). And, where not null, as many
// weights to fetch meanwhile.
struct BlockRows {
  const float* w;
  const float* next[kRows];
};

// out[j, :] = or += sum_t w[j][t] panel[t, :], R rows of weights by V vectors. Each sum runs over its steps in order.
//
// A line of each row is fetched every 16 steps: all of them at once are more than can be on their way, and what is read
// next waits behind them.
template <int R, int V>
static __attribute__((noinline)) void multiply(const BlockRows& rows, bool fetch, const float* panel, int64_t steps,
                                               float* out, int64_t out_step, bool add) {
  const float* w = rows.w;
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[j][v] = splat(0.0f);
  }
  for (int64_t t = 0; t < steps;) {
    for (int j = 0; fetch && j < R; j++) __builtin_prefetch(rows.next[j] + t);
    const int64_t end = t + 16 < steps ? t + 16 : steps;
    for (; t < end; t++, panel += kColumns) {
      Vec x[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) x[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
      for (int j = 0; j < R; j++) {
        const Vec weight = splat(w[j * kChain + t]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[j][v] += weight * x[v];
      }
    }
  }
  put_sums(sum, out, out_step, add);
}

typedef void (*Multiply)(const BlockRows&, bool, const float*, int64_t, float*, int64_t, bool);

template <int R, int V>
static Multiply multiply_for(int64_t rows) {
  if constexpr (R == 1) {
    return multiply<1, V>;
  } else {
    return rows >= R ? multiply<R, V> : multiply_for<R - 1, V>(rows);
  }
}

// A group of rows of weights, each with the row that is read after it. Found once: WeightRows::at divides.
template <typename Weight>
struct RowGroup {
  const Weight *row[kRows], *after[kRows];
  int64_t D;

  CLP_INLINE_MEMBER RowGroup(const WeightRows<Weight>& weights, int64_t first, int64_t count) : D(weights.D) {
    for (int64_t j = 0; j < count; j++) {
      row[j] = weights.at(first + j);
      after[j] = weights.at(first + j + kRows);
    }
  }

  // Terms [d, d + steps) of row j, as floats, into `wide`. `fetch`: where float terms that are read next lie; 16-bit
  // ones are fetched here.
  CLP_INLINE_MEMBER void terms(int64_t j, int64_t d, int64_t steps, float* wide, const float*& fetch) const {
    const Weight *from = row[j] + d, *next = d + kChain < D ? from + kChain : after[j];
    if constexpr (sizeof(Weight) == 4) {
      fetch = next;
    } else {
      for (int64_t t = 0; t < kChain; t += 32) __builtin_prefetch(next + t);
    }
    widen_row(from, steps, 1.0f, wide);
  }
};

// out[row * step + p * kColumns + i] = <row, x_i of panel p>, block after block of kChain terms; for `count` rows from
// `row`. Added to what is there where `add`.
template <typename Weight>
static void group_products(const WeightRows<Weight>& rows, int64_t row, int64_t count, const Panel* panels,
                           int64_t num_panels, const float* x, float* out, int64_t step) {
  alignas(64) float wide[kRows * kChain];
  const int64_t D = rows.D;
  const RowGroup<Weight> group{rows, row, count};
  const Multiply two = multiply_for<kRows, 2>(count), one = multiply_for<kRows, 1>(count);
  for (int64_t d = 0; d < D || d == 0; d += kChain) {
    const int64_t steps = D - d < kChain ? D - d : kChain;
    BlockRows block;
    block.w = wide;
    block.next[0] = nullptr;
    for (int64_t j = 0; j < count; j++) group.terms(j, d, steps, wide + j * kChain, block.next[j]);
    for (int64_t p = 0; p < num_panels; p++) {
      const auto multiply_panel = panels[p].rows > kWidth ? two : one;
      const bool fetch = p == 0 && block.next[0];
      multiply_panel(block, fetch, x + (p * D + d) * kColumns, steps, out + p * kColumns, step, d > 0);
    }
  }
}

// The same for all rows, one group after the other.
template <typename Weight>
static void all_products(const WeightRows<Weight>& rows, const Panel* panels, int64_t num_panels, const float* x,
                         float* out, int64_t step) {
  for (int64_t row = 0; row < rows.count; row += kRows) {
    const int64_t count = rows.count - row < kRows ? rows.count - row : kRows;
    group_products(rows, row, count, panels, num_panels, x, out + row * step, step);
  }
}
