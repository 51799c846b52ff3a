// Between the driver of mixed_embedding on the CPU and its kernels. Includes no standard header: see
// mixed_linear_cpu.h.
//
// Letters: m rows (token positions), v vocabulary, d width, k copies, s distinct weightings.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp {

struct EmbeddingTables {
  const void* base;    // [V, D] or null
  const void* deltas;  // [V, K, D]
  Dtype base_dtype;    // that of y
  Dtype deltas_dtype;
  int64_t V, K, D;
};

// y[m] = base[ids[m]] + sum_k c[m, k] deltas[ids[m], k]. A copy whose coefficient is 0 is not read.
struct EmbeddingJob {
  EmbeddingTables tables;
  const int64_t* ids;      // [M], each in [0, V)
  const int32_t* row_map;  // [M]
  const float* c;          // [S, K]
  void* y;                 // [M, D]
};

// Rows of one id, in their order: order[begin, end).
struct IdGroup {
  int64_t begin, end, id;
};

// d_base[v] = sum of dy[m], d_deltas[v, k] = sum of c[m, k] dy[m] over the rows of id v, written for ids that occur and
// are not padding; terms[m, k] = <dy[m], deltas[ids[m], k]>.
struct EmbeddingGradJob {
  EmbeddingTables tables;
  const int32_t* row_map;
  const float* c;
  const void* dy;          // [M, D], of base_dtype
  const int64_t* order;    // [M], rows sorted by id
  const IdGroup* groups;
  int64_t padding_idx;     // -1: none
  void* d_base;            // [V, D] or null
  void* d_deltas;          // [V, K, D] or null
  bool adds_deltas;        // d_deltas is float32 and added to; else it has the deltas' dtype and is written
  double* terms;           // [M, K] or null
};

struct EmbeddingKernels {
  void (*forward)(const EmbeddingJob& job, int64_t m_begin, int64_t m_end);
  // `scratch` holds 2 * (K + 1) * D floats.
  void (*backward)(const EmbeddingGradJob& job, int64_t group_begin, int64_t group_end, float* scratch);
};

extern const EmbeddingKernels embedding_kernels_portable;
#if defined(__x86_64__)
extern const EmbeddingKernels embedding_kernels_avx2;
extern const EmbeddingKernels embedding_kernels_avx512;
#endif

}  // namespace clp
