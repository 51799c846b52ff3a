// Between low_rank_linear's driver on the CPU and its kernels (one set per instruction set).
//
// Letters: m rows, d in, n out, r ranks, s distinct weightings. Includes no standard header with inline functions: the
// kernels' translation units include this file and are compiled for processors that the linker's chosen copy may not
// run on.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp {

// sums[m, n] += <x[m], weight[n]> for n_begin <= n < n_end; x [M, length], weight [.., length], sums [M, N].
// Each weight is read once for all rows. A sum's bits depend on its row and weight alone.
template <typename Weight>
using AddProducts = void (*)(const float* x, int64_t M, int64_t length, const Weight* weight, int64_t n_begin,
                             int64_t n_end, float* sums, int64_t N);

struct LowRankKernels {
  AddProducts<float> add_f32;
  AddProducts<Bf16> add_bf16;
  AddProducts<Half> add_f16;
};

extern const LowRankKernels low_rank_kernels_portable;
#if defined(__x86_64__)
extern const LowRankKernels low_rank_kernels_avx2;
extern const LowRankKernels low_rank_kernels_avx512;
#endif

}  // namespace clp
