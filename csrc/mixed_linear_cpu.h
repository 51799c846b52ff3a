// Between the driver of mixed_linear on the CPU (checks, row plan, threads) and its kernels (one set per instruction set).
//
// Letters: m rows, d in, n out, k copies, s distinct weightings. Includes no standard header with inline functions: the
// kernels' translation units include this file and are compiled for processors that the linker's chosen copy may not run on.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace clp {

struct Bf16 {
  uint16_t bits;
};

enum class Dtype : int { f32 = 0, bf16 = 1 };

// base [N, D] (or null) and deltas [N, K, D], both contiguous.
struct Weights {
  const void* base;
  const void* deltas;
  Dtype base_dtype;
  Dtype deltas_dtype;
  int64_t N, K, D;
};

// Staged rows [begin, end) that share one weighting.
struct Segment {
  int64_t begin, end;
  int32_t weighting;
};

// Rows in the order in which they are staged: sorted by weighting.
struct Rows {
  int64_t M;
  const int32_t* order;      // staged row -> row of x and y; null: the same
  const int32_t* row_map;    // row of x -> weighting
  const float* c;            // [S, K]
  const Segment* segments;
  int64_t num_segments;
};

// y[m, n] = sum_d x[m, d] base[n, d] + sum_k c[m, k] (sum_d x[m, d] delta[n, k, d] + bias_delta[n, k]) + bias[n].
// One accumulator for each stream (the base, each copy), row and output; the coefficients are applied to the sums.
struct StreamJob {
  Weights weights;
  Rows rows;
  const float* x;            // [M, D]
  const Bf16* x_bf16;        // [M, D], where x itself is bf16: for instructions that multiply bf16
  const float* bias;         // [N] or null
  const float* bias_deltas;  // [N, K] or null
  void* y;                   // [M, N]
  Dtype y_dtype;
};

// y[m, j] = sum_i a[m, i] P[i, j] + bias terms, P a panel of the mix of the row's weighting: W^T (columns j are outputs n) or,
// for the gradient of x, W (columns j are inputs d).
struct GemmJob {
  Weights weights;
  Rows rows;
  bool columns_are_inputs;
  // Instead of one mix for each segment, all streams' panels one above the other, for rows a = (x, c_1 x, .., c_K x).
  bool concatenated;
  const float* a;            // staged rows, [M, length]
  int64_t length;            // of the reduction
  int64_t columns;
  const float* bias;         // [columns] or null
  const float* bias_deltas;  // [columns, K] or null
  void* y;                   // [M, columns]
  Dtype y_dtype;
  int64_t row_chunk;         // staged rows of one work item
};

// G_s = dy_s^T x_s for each segment; d_delta[:, k] = sum_s c[s, k] G_s; d_c[s, k] = <delta[:, k], G_s>.
struct GradJob {
  Weights weights;
  Rows rows;
  const float* dy;           // staged, in blocks of grad_rows outputs: [ceil(N / grad_rows), M, grad_rows]
  const float* x;            // staged rows, [M, D]
  void* d_deltas;            // [N, K, D] in the deltas' dtype, or null
  double* d_c;               // [work items, S, K], zeroed, or null
  int64_t S;
  int64_t only_copy;         // >= 0: dy holds c_k dy of this copy, only d_delta[:, k] is written; -1: all copies
};

struct Kernels {
  int64_t panel_columns;     // of a gemm panel and of a grad work item
  int64_t grad_rows;
  int64_t stream_rows;
  void (*stream)(const StreamJob& job, int64_t n_begin, int64_t n_end);
  // Work items of gemm: (row chunk, panel), the panel running faster. `panel` holds panel_columns * panel_length floats.
  void (*gemm)(const GemmJob& job, int64_t item_begin, int64_t item_end, float* panel);
  // `scratch` holds panel_columns * (M + 2 * K * grad_rows) floats.
  void (*grad)(const GradJob& job, int64_t item_begin, int64_t item_end, float* scratch);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace clp
