// Between the driver of mixed_linear on the CPU (checks, row plan, threads) and its kernels (one set per instruction
// set).
//
// Letters: m rows, d in, n out, k copies, s distinct weightings. Includes no standard header with inline functions: the
// kernels' translation units include this file and are compiled for processors that the linker's chosen copy may not
// run on.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace clp {

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// base [N, D] (or null) and deltas [N, K, D], both contiguous.
struct Weights {
  const void* base;
  const void* deltas;
  Dtype base_dtype;
  Dtype deltas_dtype;
  int64_t N, K, D;
};

// A sum of streams: the base (or not), and `count` copies, each times its coefficient. Copies that are not listed are
// not read.
struct Mix {
  bool base;
  int64_t count;
  const int32_t* copies;
  const float* c;
};

// Rows of x that share one weighting, in the order in which they are worked on: [begin, end).
struct Segment {
  int64_t begin, end;
  int32_t weighting;
};

// Rows side by side in one packed panel: `rows` of them, from `first` in the order of work.
struct Panel {
  int64_t first, rows;
  const Mix* mix;  // of all its rows; null where the streams are summed each for itself
};

// y[m, n] = sum over streams of coefficient * <x_m, stream_n>, and the bias terms. Either every panel brings its mix
// and the weights are mixed before the product, or the products of all streams are weighted by `c`. Each weight is read
// from memory once for all panels.
struct RowsJob {
  Weights weights;
  Mix streams;               // read where a panel has no mix of its own; its c is not used
  const Panel* panels;
  int64_t num_panels;
  const float* x;            // packed, [num_panels, D, panel_rows]; for `dots`, [rows, D] of the only panel
  const float* x_even_first; // for `dots` with streams of bf16: the same after even_terms_first
  const Bf16* x_bf16;        // for `dots` by kernels that take bf16 rows: x itself
  bool dots;                 // few rows: dot products along D instead of packed panels
  const float* c;            // [K, num_panels * panel_rows]
  const float* bias;         // [N] or null
  const float* bias_deltas;  // [N, K] or null
  const int32_t* order;      // order of work -> row of y; null: the same
  void* y;                   // [M, N]
  Dtype y_dtype;
};

// Weights [n0, n1) x [d0, d1) of several mixes, the weights read once for all: out[s * mix_step + (d - d0) / width *
// panel_step + (n - n0) * row_step + (d - d0) % width].
struct MixesJob {
  Weights weights;
  const Mix* const* mixes;
  int64_t num_mixes;
  bool same_copies;          // all mixes list the same ones
  int64_t n0, n1, d0, d1, width;
  bool fills;                // zeros up to a panel's end
  float* out;
  int64_t mix_step, panel_step, row_step;
};

// Rows [first, first + rows) of a matrix in the order of work, each times its scale, side by side: columns [j0, j1) in
// panels of `width`, a multiple of a vector, or in one of j1 - j0. Past j1 follows what the row holds there, or zeros.
struct StageJob {
  const void* data;
  Dtype dtype;
  const int32_t* order;      // null: as they are
  int64_t first, rows, row_size, j0, j1, width;
  const float* scales;       // [rows]; null: all one
  float* out;                // [panels, rows, width]
};

// Lines of memory that are read soon, fetched during a product: `lines` from `offset` bytes behind each row on, a few
// at a time.
struct Fetch {
  const char* const* rows;
  int64_t num_rows, offset, lines, at_once;
  bool near = false;          // into the first-level cache
  int64_t row = 0, line = 0;  // the next one
};

// out[i, j] = or += sum_t a[i, t] b[t, j], whole panels of columns. Terms of `a` lie side by side, panel_rows at a time.
// `turned`: a[t, i] with terms a_step apart. With scales, as where turned, at most `group` rows and one panel, and
// out[k, i, j] = or += scales[k] of it.
struct BlockProduct {
  const float* a;            // first index a_step apart
  int64_t a_step, a_panel;   // from one panel_rows of terms to the next
  bool turned;
  int64_t rows;
  const float* b;            // packed panels [steps, panel_rows], panel_step apart
  int64_t panel_step, steps, columns;
  bool add;
  float* out;
  int64_t out_step, out_panel, out_copy;
  const float* scales;
  int64_t copies;
};

// One tile g [rows, columns] of a segment's weight gradient, its corner at (n0, d0):
// out[n, k, d] = or += c[k] g[n, d]; dots[k] += <delta[n, k, d], g[n, d]>.
struct GradTile {
  const float* g;
  int64_t g_step;            // from one row to the next
  int64_t rows, columns, K;
  const float* c;            // [K]
  void* out;                 // null: not wanted
  Dtype out_dtype;
  int64_t first_out;         // of the corner, copy 0
  int64_t out_row, out_copy; // steps
  bool add;                  // float32 alone
  bool past_caches;          // not added to, and not read soon; others see it after end_streams
  const void* deltas;        // read for dots alone
  Dtype deltas_dtype;
  int64_t first_delta;       // of the corner, copy 0
  int64_t delta_row, delta_copy;
  double* dots;              // null: not wanted
};

struct Kernels {
  int64_t panel_rows;
  int64_t group;             // rows of a block of registers; of weights, one work item of `rows`
  int64_t max_dots;          // rows up to which `rows` takes dots
  bool dots_take_bf16;       // with streams of bf16 from rows of it; else from x_even_first
  // out[i] = scale * in[offset + i]
  void (*widen)(const void* in, Dtype dtype, int64_t offset, int64_t size, float scale, float* out);
  // out[offset + i] = in[i], rounded
  void (*narrow)(const float* in, int64_t size, void* out, Dtype dtype, int64_t offset);
  // One row of x in the order in which dots multiply streams of bf16
  void (*even_terms_first)(const float* row, int64_t size, float* out);
  // out[n - n0, d - d0] = the mix, rows `step` apart
  void (*mix)(const Weights& weights, const Mix& mix, int64_t n0, int64_t n1, int64_t d0, int64_t d1, float* out,
              int64_t step);
  // panel[d, i] = rows[i * row_step + d], zero from `count` on
  void (*pack)(const float* rows, int64_t count, int64_t D, int64_t row_step, float* panel);
  // Outputs [group * group_begin, ..); `scratch` holds rows_scratch(job) floats.
  void (*rows)(const RowsJob& job, int64_t group_begin, int64_t group_end, float* scratch);
  void (*mix_blocks)(const MixesJob& job);
  void (*stage)(const StageJob& job);
  void (*block_product)(const BlockProduct& job, Fetch& fetch);
  // out[j, i] = in[i, j]
  void (*turn)(const float* in, int64_t in_step, int64_t rows, int64_t columns, float* out, int64_t out_step);
  void (*grad)(const GradTile& tile);
  void (*end_streams)();     // of the calling thread: once for many tiles, whose writes would wait for it
};

// Floats that one thread of `rows` needs: sums of a group's streams, and its mixed weights.
inline int64_t rows_scratch(const Kernels& kernels, const RowsJob& job) {
  const int64_t sums = kernels.group * (job.streams.count + 2) * job.num_panels * kernels.panel_rows;
  return sums + (job.dots ? 0 : kernels.group * job.weights.D);
}

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace clp
