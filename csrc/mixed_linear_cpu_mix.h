// Passes over tiles that lie in a cache: conversions, panels of the mix, panels of x, the gradient from one product.
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

static void pack(const float* rows, int64_t count, int64_t D, int64_t row_step, int64_t step, float* panel) {
  if (step != 1) {  // rows lie side by side
    if (count < kColumns) __builtin_memset(panel, 0, D * kColumns * 4);
    for (int64_t d = 0; d < D; d++) __builtin_memcpy(panel + d * kColumns, rows + d * step, count * 4);
    return;
  }
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

CLP_INLINE void scale_row(const float* g, float c, int64_t size, bool add, float* out) {
  int64_t i = 0;
  if (add) {
    for (; i + kWidth <= size; i += kWidth) store(out + i, load(out + i) + load(g + i) * c);
    for (; i < size; i++) out[i] += g[i] * c;
  } else {
    for (; i + kWidth <= size; i += kWidth) store(out + i, load(g + i) * c);
    for (; i < size; i++) out[i] = g[i] * c;
  }
}

template <typename Delta>
CLP_INLINE float dot_row(const Delta* delta, const float* g, int64_t size) {
  Vec left = splat(0.0f), right = splat(0.0f);
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    left += load(delta + i) * load(g + i);
    right += load(delta + i + kWidth) * load(g + i + kWidth);
  }
  float total = sum_lanes(left + right);
  for (; i < size; i++) total += load_one(delta + i) * g[i];
  return total;
}

static void grad(const GradTile& tile) {
  for (int64_t row = 0; row < tile.rows; row++) {
    const float* g = tile.g + row * tile.g_step;
    for (int64_t k = 0; k < tile.K; k++) {
      if (tile.out) {
        scale_row(g, tile.c[k], tile.columns, tile.add, tile.out + row * tile.out_row + k * tile.out_copy);
      }
      if (!tile.dots) continue;
      const int64_t at = tile.first_delta + row * tile.delta_row + k * tile.delta_copy;
      with_type(tile.deltas_dtype, tile.deltas,
                [&](const auto* deltas) { tile.dots[k] += dot_row(deltas + at, g, tile.columns); });
    }
  }
}
