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

// Packed panels of columns [j0, j1), terms [i0, i1) of each of several mixes, one after the other; columns are outputs
// n and terms inputs d, or, where `transposed`, the other way round. Zero past j1.
struct PanelsJob {
  Weights weights;
  const Mix* const* mixes;
  int64_t num_mixes;
  bool transposed;
  int64_t j0, j1, i0, i1;
  float* out;                // [num_mixes, num_panels, i1 - i0, panel_rows]
};

// out[i, j] = or += <row i of a, column j of b>, in blocks of a fixed size. One of a's steps is 1.
struct OwnProduct {
  const float* a;            // [rows, length]
  int64_t rows, length, row_step, step;
  const Panel* panels;       // of columns of b
  int64_t num_panels, columns;
  const float* b;            // packed, [num_panels, length, panel_rows]
  bool add;
  float* out;
  int64_t out_step;
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
  bool past_caches;          // not added to, and not read soon
  const void* deltas;        // read for dots alone
  Dtype deltas_dtype;
  int64_t first_delta;       // of the corner, copy 0
  int64_t delta_row, delta_copy;
  double* dots;              // null: not wanted
};

struct Kernels {
  int64_t panel_rows;
  int64_t group;             // rows of weights (of a) of one work item of `rows` (`product`)
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
  void (*mix_panels)(const PanelsJob& job);
  // panel[d, i] = rows[i * row_step + d * step], zero from `count` on; one of the steps is 1
  void (*pack)(const float* rows, int64_t count, int64_t D, int64_t row_step, int64_t step, float* panel);
  // Outputs [group * group_begin, ..); `scratch` holds rows_scratch(job) floats.
  void (*rows)(const RowsJob& job, int64_t group_begin, int64_t group_end, float* scratch);
  // Rows [group * group_begin, ..) of out; `scratch` holds group * num_panels * panel_rows floats.
  void (*product)(const OwnProduct& job, int64_t group_begin, int64_t group_end, float* scratch);
  void (*grad)(const GradTile& tile);
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
