// Passes over tiles that lie in a cache: conversions, rows of the mix, panels of x, the gradient from one product.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_vector.h.

template <typename From>
CLP_INLINE void widen_row(const From* in, int64_t size, float scale, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, load(in + i) * scale);
  for (; i < size; i++) out[i] = load_one(in + i) * scale;
}

static void widen(const void* in, Dtype dtype, int64_t offset, int64_t size, float scale, float* out) {
  with_type(dtype, in, [&](const auto* from) { widen_row(from + offset, size, scale, out); });
}

template <typename To>
CLP_INLINE void narrow_row(const float* in, int64_t size, const To* to) {
  To* out = (To*)to;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, load(in + i));
  for (; i < size; i++) store_one(out + i, in[i]);
}

static void narrow(const float* in, int64_t size, void* out, Dtype dtype, int64_t offset) {
  with_type(dtype, out, [&](const auto* to) { narrow_row(in, size, to + offset); });
}

// out[i] += sum_a c[a] deltas[copies[a] * step + i], in the order of the list.
template <typename Delta>
CLP_INLINE void add_copies(const Mix& mix, const Delta* deltas, int64_t step, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    Vec left = load(out + i), right = load(out + i + kWidth);
    for (int64_t a = 0; a < mix.count; a++) {
      const Delta* delta = deltas + mix.copies[a] * step + i;
      left += load(delta) * mix.c[a];
      right += load(delta + kWidth) * mix.c[a];
    }
    store(out + i, left);
    store(out + i + kWidth, right);
  }
  // One by one, but with the same fused operations: the bits of a weight do not depend on where a block of them ends.
  for (; i < size; i++) {
    Vec sum = splat(out[i]);
    for (int64_t a = 0; a < mix.count; a++) sum += splat(load_one(deltas + mix.copies[a] * step + i)) * mix.c[a];
    out[i] = sum[0];
  }
}

static void mix(const Weights& w, const Mix& mix, int64_t n0, int64_t n1, int64_t d0, int64_t d1, float* out,
                int64_t step) {
  for (int64_t n = n0; n < n1; n++, out += step) {
    if (mix.base) {
      widen(w.base, w.base_dtype, n * w.D + d0, d1 - d0, 1.0f, out);
    } else {
      __builtin_memset(out, 0, (d1 - d0) * 4);
    }
    with_type(w.deltas_dtype, w.deltas,
              [&](const auto* deltas) { add_copies(mix, deltas + n * w.K * w.D + d0, w.D, d1 - d0, out); });
  }
}

// kWidth weights of the mix, or the one in all lanes. The same fused operations: the bits of a weight do not depend on
// where a block of them ends.
template <typename Base, typename Delta>
CLP_INLINE Vec mixed(const Mix& mix, const Base* base, const Delta* deltas, int64_t step) {
  Vec sum = mix.base ? load(base) : splat(0.0f);
  for (int64_t a = 0; a < mix.count; a++) sum += load(deltas + mix.copies[a] * step) * mix.c[a];
  return sum;
}

template <typename Base, typename Delta>
CLP_INLINE float mixed_one(const Mix& mix, const Base* base, const Delta* deltas, int64_t step) {
  Vec sum = splat(mix.base ? load_one(base) : 0.0f);
  for (int64_t a = 0; a < mix.count; a++) sum += splat(load_one(deltas + mix.copies[a] * step)) * mix.c[a];
  return sum[0];
}

static void pack(const float* rows, int64_t count, int64_t D, int64_t row_step, float* panel) {
  for (int64_t first = 0; first < kColumns; first += kWidth) {
    float* out = panel + first;
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) {
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) {
        block[i] = first + i < count ? load(rows + (first + i) * row_step + d) : splat(0.0f);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) store(out + (d + i) * kColumns, block[i]);
    }
    for (; d < D; d++) {
      for (int64_t i = 0; i < kWidth; i++) {
        out[d * kColumns + i] = first + i < count ? rows[(first + i) * row_step + d] : 0.0f;
      }
    }
  }
}

CLP_INLINE void add_row(const float* g, float c, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, load(out + i) + load(g + i) * c);
  for (; i < size; i++) out[i] += g[i] * c;
}

template <typename Out>
CLP_INLINE void scale_row(const float* g, float c, int64_t size, bool past_caches, const Out* to) {
  Out* out = (Out*)to;
  int64_t i = 0;
  if (past_caches && (uintptr_t)out % (kWidth * sizeof(Out)) == 0) {
    for (; i + kWidth <= size; i += kWidth) stream(out + i, load(g + i) * c);
  } else {
    for (; i + kWidth <= size; i += kWidth) store(out + i, load(g + i) * c);
  }
  for (; i < size; i++) store_one(out + i, g[i] * c);
}

// <delta, g> over rows of a tile, few enough for one float32 sum.
template <typename Delta>
CLP_INLINE float dot_rows(const GradTile& tile, const Delta* delta, const float* g, int64_t rows) {
  Vec left = splat(0.0f), right = splat(0.0f);
  float rest = 0.0f;
  for (int64_t row = 0; row < rows; row++, delta += tile.delta_row, g += tile.g_step) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= tile.columns; i += 2 * kWidth) {
      left += load(delta + i) * load(g + i);
      right += load(delta + i + kWidth) * load(g + i + kWidth);
    }
    for (; i < tile.columns; i++) rest += load_one(delta + i) * g[i];
  }
  return sum_lanes(left + right) + rest;
}

static void add_dots(const GradTile& tile) {
  constexpr int64_t together = 1024;
  const int64_t step = tile.columns < together ? together / (tile.columns > 0 ? tile.columns : 1) : 1;
  with_type(tile.deltas_dtype, tile.deltas, [&](const auto* deltas) {
    for (int64_t k = 0; k < tile.K; k++) {
      for (int64_t row = 0; row < tile.rows; row += step) {
        const int64_t rows = tile.rows - row < step ? tile.rows - row : step;
        const auto* delta = deltas + tile.first_delta + row * tile.delta_row + k * tile.delta_copy;
        tile.dots[k] += dot_rows(tile, delta, tile.g + row * tile.g_step, rows);
      }
    }
  });
}

static void grad(const GradTile& tile) {
  for (int64_t row = 0; tile.out && row < tile.rows; row++) {
    const float* g = tile.g + row * tile.g_step;
    for (int64_t k = 0; k < tile.K; k++) {
      const int64_t to = tile.first_out + row * tile.out_row + k * tile.out_copy;
      if (tile.add) {
        add_row(g, tile.c[k], tile.columns, (float*)tile.out + to);
        continue;
      }
      with_type(tile.out_dtype, tile.out, [&](const auto* out) {
        scale_row(g, tile.c[k], tile.columns, tile.past_caches, out + to);
      });
    }
  }
  if (tile.dots) add_dots(tile);
}
