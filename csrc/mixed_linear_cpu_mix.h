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

// A later row's part of each stream that `mix` reads: to the processor's own prefetcher every row is a new start.
template <typename Base, typename Delta>
CLP_INLINE void prefetch_streams(const Mix& mix, const Base* base, const Delta* deltas, int64_t step) {
  if (mix.base) __builtin_prefetch(base);
  for (int64_t a = 0; a < mix.count; a++) __builtin_prefetch(deltas + mix.copies[a] * step);
}

// Columns are inputs d, terms are outputs n: rows of weights become rows of panels.
template <typename Base, typename Delta>
static void mix_row_panels(const PanelsJob& job, const Base* base, const Delta* deltas) {
  const Weights& w = job.weights;
  const int64_t length = job.i1 - job.i0, columns = job.j1 - job.j0, ahead = 4;
  const int64_t panels = (columns + kColumns - 1) / kColumns, size = panels * length * kColumns;
  for (int64_t i = 0; i < length; i++) {
    const Base* base_row = base + (job.i0 + i) * w.D + job.j0;
    const Delta* delta_row = deltas + (job.i0 + i) * w.K * w.D + job.j0;
    for (int64_t j = 0; i + ahead < length && j < columns; j += kWidth) {
      prefetch_streams(*job.mixes[0], base_row + ahead * w.D + j, delta_row + ahead * w.K * w.D + j, w.D);
    }
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t s = 0; s < job.num_mixes; s++) {
        const Mix& mix = *job.mixes[s];
        float* out = job.out + s * size + (p * length + i) * kColumns;
        for (int64_t j = p * kColumns; j < (p + 1) * kColumns; j += kWidth, out += kWidth) {
          if (j + kWidth <= columns) {
            store(out, mixed(mix, base_row + j, delta_row + j, w.D));
            continue;
          }
          for (int64_t t = 0; t < kWidth; t++) {
            out[t] = j + t < columns ? mixed_one(mix, base_row + j + t, delta_row + j + t, w.D) : 0.0f;
          }
        }
      }
    }
  }
}

// Columns are outputs n, terms are inputs d: rows of weights become columns of panels.
template <typename Base, typename Delta>
static void mix_column_panels(const PanelsJob& job, const Base* base, const Delta* deltas) {
  const Weights& w = job.weights;
  const int64_t length = job.i1 - job.i0, columns = job.j1 - job.j0;
  const int64_t width = (columns + kColumns - 1) / kColumns * kColumns, size = width * length;
  for (int64_t j = 0; j < width; j += kWidth) {
    const int64_t count = columns - j < kWidth ? columns - j : kWidth;  // may be negative: all past the end
    const Base* base_rows = base + (job.j0 + j) * w.D + job.i0;
    const Delta* delta_rows = deltas + (job.j0 + j) * w.K * w.D + job.i0;
    for (int64_t i = 0; i < length; i += kWidth) {
      for (int64_t t = 0; j + kWidth + t < columns && t < kWidth; t++) {
        const int64_t n = kWidth + t;
        prefetch_streams(*job.mixes[0], base_rows + n * w.D + i, delta_rows + n * w.K * w.D + i, w.D);
      }
      for (int64_t s = 0; s < job.num_mixes; s++) {
        const Mix& mix = *job.mixes[s];
        float* out = job.out + s * size + (j / kColumns * length + i) * kColumns + j % kColumns;
        if (i + kWidth <= length) {
          Vec block[kWidth];
#pragma GCC unroll 16
          for (int64_t t = 0; t < kWidth; t++) {
            block[t] = splat(0.0f);
            if (t < count) block[t] = mixed(mix, base_rows + t * w.D + i, delta_rows + t * w.K * w.D + i, w.D);
          }
          transpose(block);
#pragma GCC unroll 16
          for (int64_t t = 0; t < kWidth; t++) store(out + t * kColumns, block[t]);
          continue;
        }
        for (int64_t d = i; d < length; d++, out += kColumns) {
          for (int64_t t = 0; t < kWidth; t++) {
            out[t] = t < count ? mixed_one(mix, base_rows + t * w.D + d, delta_rows + t * w.K * w.D + d, w.D) : 0.0f;
          }
        }
      }
    }
  }
}

static void mix_panels(const PanelsJob& job) {
  const Weights& w = job.weights;
  const auto run = [&](const auto* base, const auto* deltas) {
    job.transposed ? mix_row_panels(job, base, deltas) : mix_column_panels(job, base, deltas);
  };
  with_type(w.deltas_dtype, w.deltas, [&](const auto* deltas) {
    if (!w.base) return run(deltas, deltas);  // never read as a base, but a place to count from
    with_type(w.base_dtype, w.base, [&](const auto* base) { run(base, deltas); });
  });
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
      const int64_t to = tile.first_out + row * tile.out_row + k * tile.out_copy;
      if (tile.out && tile.add) add_row(g, tile.c[k], tile.columns, (float*)tile.out + to);
      if (tile.out && !tile.add) {
        with_type(tile.out_dtype, tile.out, [&](const auto* out) {
          scale_row(g, tile.c[k], tile.columns, tile.past_caches, out + to);
        });
      }
      if (!tile.dots) continue;
      const int64_t at = tile.first_delta + row * tile.delta_row + k * tile.delta_copy;
      with_type(tile.deltas_dtype, tile.deltas,
                [&](const auto* deltas) { tile.dots[k] += dot_row(deltas + at, g, tile.columns); });
    }
  }
  if (tile.past_caches) end_streams();
}
