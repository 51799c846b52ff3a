// Between the driver of mixed_norm on the CPU and its kernels. Includes no standard header: see mixed_linear_cpu.h.
//
// Letters: m rows, d width, k copies, s distinct weightings.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp {

// Sums of gradients run over at most so many rows before they are added to a larger sum.
constexpr int64_t kNormChunk = 64;

// Parameters as float32; the deltas with their copies apart, so that a vector holds neighbouring d.
struct NormParameters {
  const float* weight;         // [D], the offset added
  const float* weight_deltas;  // [K, D]
  const float* bias;           // [D], or null where there is neither bias nor bias deltas
  const float* bias_deltas;    // [K, D] or null
  int64_t K, D;
};

struct NormRows {
  const void* x;               // [M, D]
  Dtype dtype;                 // of x, y, dy and dx
  const int32_t* row_map;      // [M]
  const float* c;              // [S, K]
  float eps;
  bool is_centered;            // LayerNorm; else RMSNorm
  bool cast_before_scale;      // round the normalised x to x's dtype before it is scaled
};

// y[m] = norm(x[m]) * (weight + sum_k c[m, k] weight_delta_k) + bias + sum_k c[m, k] bias_delta_k
struct NormJob {
  NormParameters parameters;
  NormRows rows;
  void* y;                     // [M, D]
};

// Work items are blocks of `block_rows` rows, the same for any number of threads. Of a block's rows, with n = norm(x):
//   weight_sums [blocks, K + 1, D]  sum dy n, then for each copy sum c[m, k] dy n
//   bias_sums   [blocks, K + 1, D]  the same of dy
//   terms       [M, K]              zeroed before; summed over a weighting's rows, the gradient of its coefficients
struct NormGradJob {
  NormParameters parameters;
  NormRows rows;
  int64_t M, block_rows;
  const void* dy;              // [M, D]
  void* dx;                    // [M, D] or null
  float* weight_sums;          // or null
  float* bias_sums;            // or null
  double* terms;               // or null
};

struct NormKernels {
  // `scratch` holds 2 * D floats.
  void (*forward)(const NormJob& job, int64_t m_begin, int64_t m_end, float* scratch);
  // `scratch` holds (2 * K + 5) * D floats.
  void (*backward)(const NormGradJob& job, int64_t block_begin, int64_t block_end, float* scratch);
};

extern const NormKernels norm_kernels_portable;
#if defined(__x86_64__)
extern const NormKernels norm_kernels_avx2;
extern const NormKernels norm_kernels_avx512;
#endif

}  // namespace clp
