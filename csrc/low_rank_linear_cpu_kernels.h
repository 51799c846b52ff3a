// The kernels of low_rank_linear for one instruction set. The including file has set the compiler's target and defines
//   CLP_ISA           name of the set: a namespace, and the suffix of the exported table
//   CLP_WIDTH         floats of a vector
//   CLP_STREAM_ROWS   rows of a register block (by 3 outputs): 4 or 8
// Everything is internal to the translation unit but the table, so that no other one can pick up code that its
// processor lacks.

#define CLP_JOIN_(a, b) a##b
#define CLP_JOIN(a, b) CLP_JOIN_(a, b)

namespace clp {
namespace CLP_ISA {
namespace {

constexpr int kWidth = CLP_WIDTH;
constexpr int kStreamRows = CLP_STREAM_ROWS;
constexpr int kOutputs = 3;  // summed together: 3 outputs by 4 rows fill AVX2's 16 registers, by 8 rows AVX-512's 32

#include "mixed_linear_cpu_vector.h"

// Terms that a lane adds one by one. Sums of such blocks are added in their order: one chain over a whole row would err
// more than torch's product does.
constexpr int64_t kChain = 128 * kWidth;

// sums[i, j] += <x[i], weight[j]> for R rows and J outputs.
template <int R, int J, typename Weight>
static __attribute__((noinline)) void add_block(const float* x, int64_t length, const Weight* weight, float* sums,
                                                int64_t N) {
  for (int64_t first = 0; first < length; first += kChain) {
    const int64_t end = length - first < kChain ? length : first + kChain;
    Vec sum[J][R];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) sum[j][i] = splat(0.0f);
    }
    int64_t d = first;
    for (; d + kWidth <= end; d += kWidth) {
      Vec column[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) column[j] = load(weight + j * length + d);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Vec value = load(x + i * length + d);
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) sum[j][i] += column[j] * value;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) {
        float total = sum_lanes(sum[j][i]);
        for (int64_t t = d; t < end; t++) total += load_one(weight + j * length + t) * x[i * length + t];
        sums[i * N + j] += total;
      }
    }
  }
}

// R rows, then the rest of them in blocks of half as many.
template <int R, int J, typename Weight>
CLP_INLINE void add_rows(const float* x, int64_t M, int64_t length, const Weight* weight, float* sums, int64_t N) {
  for (; M >= R; M -= R, x += R * length, sums += R * N) add_block<R, J>(x, length, weight, sums, N);
  if constexpr (R > 1) add_rows<R / 2, J>(x, M, length, weight, sums, N);
}

template <typename Weight>
static void add_products(const float* x, int64_t M, int64_t length, const Weight* weight, int64_t n_begin,
                         int64_t n_end, float* sums, int64_t N) {
  int64_t n = n_begin;
  for (; n + kOutputs <= n_end; n += kOutputs) {
    add_rows<kStreamRows, kOutputs>(x, M, length, weight + n * length, sums + n, N);
  }
  for (; n < n_end; n++) add_rows<kStreamRows, 1>(x, M, length, weight + n * length, sums + n, N);
}

}  // namespace
}  // namespace CLP_ISA

extern const LowRankKernels CLP_JOIN(low_rank_kernels_, CLP_ISA);
const LowRankKernels CLP_JOIN(low_rank_kernels_, CLP_ISA) = {
    CLP_ISA::add_products<float>, CLP_ISA::add_products<Bf16>, CLP_ISA::add_products<Half>};

}  // namespace clp
