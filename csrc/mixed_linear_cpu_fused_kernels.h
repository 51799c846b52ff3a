// The parts of products that mix their weights as they go: blocks of several mixes, rows side by side, and tiles of
// kRows by kColumns sums in registers.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_mix.h.

// Up to so many copies wait in registers while all mixes of a block are made of them.
constexpr int kHeldCopies = 4;

// kWidth weights of all mixes, one for each `mix_step`, from streams that are read once.
template <int count, typename Base, typename Delta>
CLP_INLINE void mix_held(const MixesJob& job, const Base* base, const Delta* deltas, float* out) {
  const int32_t* copies = job.mixes[0]->copies;
  const Vec start = job.mixes[0]->base ? load(base) : splat(0.0f);
  Vec held[count];
#pragma GCC unroll 4
  for (int a = 0; a < count; a++) held[a] = load(deltas + copies[a] * job.weights.D);
  for (int64_t s = 0; s < job.num_mixes; s++) {
    const float* c = job.mixes[s]->c;
    Vec sum = start;
#pragma GCC unroll 4
    for (int a = 0; a < count; a++) sum += held[a] * c[a];
    store(out + s * job.mix_step, sum);
  }
}

template <typename Base, typename Delta>
CLP_INLINE void mix_each(const MixesJob& job, const Base* base, const Delta* deltas, float* out) {
  for (int64_t s = 0; s < job.num_mixes; s++) {
    store(out + s * job.mix_step, mixed(*job.mixes[s], base, deltas, job.weights.D));
  }
}

// A row of weights, inputs [d0, d1), `held` copies in registers (-1: any number, read for each mix).
template <int held, typename Base, typename Delta>
static void mix_row(const MixesJob& job, const Base* base, const Delta* deltas, float* out) {
  const int64_t size = job.d1 - job.d0;
  for (int64_t at = 0; at < size; at += job.width, out += job.panel_step) {
    const int64_t end = at + job.width < size ? at + job.width : size;
    int64_t d = at;
    for (; d + kWidth <= end; d += kWidth) {
      if constexpr (held >= 0) {
        mix_held<held>(job, base + d, deltas + d, out + d - at);
      } else {
        mix_each(job, base + d, deltas + d, out + d - at);
      }
    }
    for (int64_t s = 0; s < job.num_mixes; s++) {
      float* to = out + s * job.mix_step;
      for (int64_t t = d; t < end; t++) to[t - at] = mixed_one(*job.mixes[s], base + t, deltas + t, job.weights.D);
      // Past the last input: multiplied into sums that nobody reads, but they should be numbers.
      for (int64_t t = end; job.fills && t < at + job.width; t++) to[t - at] = 0.0f;
    }
  }
}

template <typename Base, typename Delta>
static void mix_all_rows(const MixesJob& job, const Base* base, const Delta* deltas) {
  typedef void (*MixRow)(const MixesJob&, const Base*, const Delta*, float*);
  static constexpr MixRow by_count[kHeldCopies + 1] = {
      mix_row<0, Base, Delta>, mix_row<1, Base, Delta>, mix_row<2, Base, Delta>, mix_row<3, Base, Delta>,
      mix_row<4, Base, Delta>};
  const Weights& w = job.weights;
  const int64_t count = job.mixes[0]->count;
  const MixRow run = job.same_copies && count <= kHeldCopies ? by_count[count] : mix_row<-1, Base, Delta>;
  for (int64_t n = job.n0; n < job.n1; n++) {
    run(job, base + n * w.D + job.d0, deltas + n * w.K * w.D + job.d0, job.out + (n - job.n0) * job.row_step);
  }
}

static void mix_blocks(const MixesJob& job) {
  const Weights& w = job.weights;
  with_type(w.deltas_dtype, w.deltas, [&](const auto* deltas) {
    if (!w.base) return mix_all_rows(job, deltas, deltas);  // never read as a base, but a place to count from
    with_type(w.base_dtype, w.base, [&](const auto* base) { mix_all_rows(job, base, deltas); });
  });
}

// `vectors`: of a panel; 0: any number, or part of one.
template <int vectors, typename Value>
static void stage_panel(const StageJob& job, const Value* values, int64_t j0, float* out) {
  const int64_t size = job.j1 - j0 < job.width ? job.j1 - j0 : job.width;
  for (int64_t m = 0; m < job.rows; m++, out += job.width) {
    const Value* from = values + (job.order ? job.order[job.first + m] : job.first + m) * job.row_size + j0;
    const float scale = job.scales ? job.scales[m] : 1.0f;
    if constexpr (vectors > 0) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) store(out + v * kWidth, load(from + v * kWidth) * scale);
    } else {
      widen_row(from, size, scale, out);
      for (int64_t j = size; j < job.width; j++) out[j] = 0.0f;
    }
  }
}

template <typename Value>
static void stage_rows(const StageJob& job, const Value* values) {
  float* out = job.out;
  for (int64_t j0 = job.j0; j0 < job.j1; j0 += job.width, out += job.rows * job.width) {
    // Whole vectors past j1 too, where they still lie in the row.
    const bool is_whole = j0 + job.width <= job.row_size;
    if (is_whole && job.width == kWidth) {
      stage_panel<1>(job, values, j0, out);
    } else if (is_whole && job.width == kColumns) {
      stage_panel<2>(job, values, j0, out);
    } else {
      stage_panel<0>(job, values, j0, out);
    }
  }
}

static void stage(const StageJob& job) {
  with_type(job.dtype, job.data, [&](const auto* values) { stage_rows(job, values); });
}

CLP_INLINE void fetch_some(Fetch& fetch) {
  for (int64_t i = 0; i < fetch.at_once && fetch.row < fetch.num_rows; i++) {
    const char* line = fetch.rows[fetch.row] + fetch.offset + 64 * fetch.line;
    fetch.near ? __builtin_prefetch(line, 0, 3) : __builtin_prefetch(line, 0, 2);
    if (++fetch.line == fetch.lines) {
      fetch.line = 0;
      fetch.row++;
    }
  }
}

template <int R, int V>
CLP_INLINE void put_sums(const Vec (&sum)[R][V], float* out, int64_t step, bool add) {
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* to = out + j * step + v * kWidth;
      store(to, add ? load(to) + sum[j][v] : sum[j][v]);
    }
  }
}

template <int R, int V>
CLP_INLINE void share_sums(const Vec (&sum)[R][V], const BlockProduct& job) {
  float* out = job.out;
  for (int64_t k = 0; k < job.copies; k++, out += job.out_copy) {
    const Vec scale = splat(job.scales[k]);
#pragma GCC unroll 16
    for (int j = 0; j < R; j++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        float* to = out + j * job.out_step + v * kWidth;
        store(to, job.add ? load(to) + scale * sum[j][v] : scale * sum[j][v]);
      }
    }
  }
}

// Terms between two of a product's other works.
constexpr int64_t kSteps = kColumns < 16 ? kColumns : 16;

// R rows by V vectors of sum_t a[i, t] b[t, j]. `shares`: each copy takes its share. A line of what is read next is
// fetched now and then, and b a few steps ahead (AVX-512, b in the second-level cache: 210 GFLOP/s of one Xeon core,
// 150 to 195 without).
template <int R, int V, bool turned, bool shares>
static __attribute__((noinline)) void multiply_tile(const BlockProduct& job, const float* a, const float* b, float* out,
                                                    Fetch& fetch) {
  constexpr int64_t ahead = 16 * kColumns;
  const int64_t a_step = job.a_step, a_panel = job.a_panel, out_step = job.out_step, steps = job.steps;
  const bool add = job.add;
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int j = 0; j < R; j++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      sum[j][v] = splat(0.0f);
      if (add) __builtin_prefetch(out + j * out_step + v * kWidth);
    }
  }
  const auto step = [&](const float* at, int64_t i, int64_t t) __attribute__((always_inline)) {
    Vec x[V];
    if (turned) __builtin_prefetch(at + (i + 16) * a_step);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      x[v] = load(b + t * kColumns + v * kWidth);
      __builtin_prefetch(b + t * kColumns + ahead + v * kWidth);
    }
#pragma GCC unroll 16
    for (int j = 0; j < R; j++) {
      const Vec weight = splat(turned ? at[i * a_step + j] : at[j * a_step + i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[j][v] += weight * x[v];
    }
  };
  const auto terms = [&](int64_t t) __attribute__((always_inline)) {
    return a + (turned ? t * a_step : t / kColumns * a_panel + t % kColumns);
  };
  int64_t t = 0;
  for (; t + kSteps <= steps; t += kSteps) {
    const float* at = terms(t);
    fetch_some(fetch);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSteps; i++) step(at, i, t + i);
  }
  for (; t < steps; t++) step(terms(t), 0, t);
  if constexpr (shares) {
    share_sums(sum, job);
  } else {
    put_sums(sum, out, out_step, add);
  }
}

typedef void (*MultiplyTile)(const BlockProduct&, const float*, const float*, float*, Fetch&);

template <int R, int V, bool turned, bool shares>
static MultiplyTile tile_for(int64_t rows) {
  if constexpr (R == 1) {
    return multiply_tile<1, V, turned, shares>;
  } else {
    return rows >= R ? multiply_tile<R, V, turned, shares> : tile_for<R - 1, V, turned, shares>(rows);
  }
}

// Group after group of the rows of `a`, which stay in the first-level cache for all panels.
static void multiply_panels(const BlockProduct& job, Fetch& fetch) {
  for (int64_t row = 0; row < job.rows; row += kRows) {
    const int64_t rows = job.rows - row < kRows ? job.rows - row : kRows;
    const MultiplyTile wide = tile_for<kRows, 2, false, false>(rows), narrow = tile_for<kRows, 1, false, false>(rows);
    for (int64_t p = 0; p * kColumns < job.columns; p++) {
      const MultiplyTile run = job.columns - p * kColumns > kWidth ? wide : narrow;
      const float* b = job.b + p * job.panel_step;
      run(job, job.a + row * job.a_step, b, job.out + row * job.out_step + p * job.out_panel, fetch);
    }
  }
}

static void block_product(const BlockProduct& job, Fetch& fetch) {
  if (!job.scales) return multiply_panels(job, fetch);
  const auto run = job.turned ? tile_for<kRows, 2, true, true>(job.rows) : tile_for<kRows, 2, false, true>(job.rows);
  run(job, job.a, job.b, job.out, fetch);
}

// out[j, i] = in[i, j]
static void turn(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out, int64_t out_step) {
  int64_t i = 0;
  for (; i + kWidth <= rows; i += kWidth) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth) {
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int t = 0; t < kWidth; t++) block[t] = load(in + (i + t) * in_step + j);
      transpose(block);
#pragma GCC unroll 16
      for (int t = 0; t < kWidth; t++) store(out + (j + t) * out_step + i, block[t]);
    }
    for (; j < columns; j++) {
      for (int t = 0; t < kWidth; t++) out[j * out_step + i + t] = in[(i + t) * in_step + j];
    }
  }
  for (; i < rows; i++) {
    for (int64_t j = 0; j < columns; j++) out[j * out_step + i] = in[i * in_step + j];
  }
}
