// Between the driver of mixed_qkv on the CPU and its own kernel. Includes no standard header: see mixed_linear_cpu.h.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp {

// Heads [M, H, head_dim] of queries or keys: normalised over head_dim where a weight is given, then rotated in place,
//   out[d] = n[d] cos[d] - n[d + head_dim / 2] sin[d], out[d + head_dim / 2] = n[d + head_dim / 2] cos[..] + n[d] sin[..]
struct RotaryJob {
  const void *cos, *sin;     // [table_rows, head_dim]; row m of the heads takes row m % table_rows
  Dtype table_dtype;
  int64_t table_rows;
  int64_t H, head_dim;
  const float* norm_weight;  // [head_dim] or null
  float eps;
  void* heads;
  Dtype dtype;
};

struct RotaryKernels {
  // `scratch` holds 3 * head_dim floats.
  void (*rotate)(const RotaryJob& job, int64_t m_begin, int64_t m_end, float* scratch);
};

extern const RotaryKernels rotary_kernels_portable;
#if defined(__x86_64__)
extern const RotaryKernels rotary_kernels_avx2;
extern const RotaryKernels rotary_kernels_avx512;
#endif

}  // namespace clp
