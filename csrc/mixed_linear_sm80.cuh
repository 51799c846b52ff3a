// Device code of the CUDA decode kernel of mixed_linear: few rows, memory-bound. No torch here, so that a host compiler
// can run the arithmetic too (tests/clp_kernels/test_cuda_source.py does, lane by lane).
//
//   y[m, n] = sum_d x[m, d] base[n, d] + sum_k c[m, k] sum_d x[m, d] deltas[n, k, d]
//             + bias[n] + sum_k c[m, k] bias_deltas[n, k]
//
// Legend: M rows, D in, N out, K copies, S distinct weightings; c[m, k] = coefficients[row_map[m], k].
//
// One warp owns FEATURES output features for ROWS rows. It streams the base row and the K copy rows of a feature once,
// in 16-byte loads; each lane keeps one float32 accumulator per (row, feature) for the stream at hand and adds it, times
// the row's coefficient, to a float32 sum, so the mix of weights is never formed and never rounded. The lanes' sums meet
// in a butterfly. Which lane takes which elements, and in which order, depends on D alone: a row's bits are the same for
// every M, every position in the batch and every neighbour.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define CLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CLP_HOST_DEVICE inline
#endif

namespace clp {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kChunk = 8;  // elements that a lane takes at a time: one 16-byte load in 16 bits, two in float32

template <typename X, typename W>
struct DecodeArguments {
  const X* x;                  // [M, D]
  const X* base;               // [N, D], or null
  const W* deltas;             // [N, K, D]
  const float* coefficients;   // [S, K]
  const int32_t* row_map;      // [M], values in [0, S)
  const X* bias;               // [N], or null
  const W* bias_deltas;        // [N, K], or null
  X* y;                        // [M, N]
  int64_t M, N, D, K;
};

CLP_HOST_DEVICE float widen(float value) { return value; }
CLP_HOST_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
CLP_HOST_DEVICE float widen(__half value) { return __half2float(value); }

template <typename T>
CLP_HOST_DEVICE T narrow(float value);
template <>
CLP_HOST_DEVICE float narrow<float>(float value) { return value; }
template <>
CLP_HOST_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16(value); }
template <>
CLP_HOST_DEVICE __half narrow<__half>(float value) { return __float2half(value); }

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Weights are read once per call: evict-first keeps x and the coefficients in the caches.
template <bool STREAMED, typename T>
CLP_HOST_DEVICE Vector<T> load_vector(const T* source) {
#ifdef __CUDA_ARCH__
  const uint4* words = reinterpret_cast<const uint4*>(source);
  const uint4 loaded = STREAMED ? __ldcs(words) : __ldg(words);
  return *reinterpret_cast<const Vector<T>*>(&loaded);
#else
  return *reinterpret_cast<const Vector<T>*>(source);
#endif
}

// Reads elements d .. d + kChunk of a row of D, zeros past its end. ALIGNED: 16-byte rows and D a multiple of kChunk.
template <bool ALIGNED, bool STREAMED, typename T>
CLP_HOST_DEVICE void load_chunk(const T* row, int64_t d, int64_t D, float (&out)[kChunk]) {
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < kChunk; i += Vector<T>::kSize) {
      const Vector<T> vector = load_vector<STREAMED>(row + d + i);
#pragma unroll
      for (int j = 0; j < Vector<T>::kSize; ++j) out[i + j] = widen(vector.element[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) out[j] = d + j < D ? widen(row[d + j]) : 0.0f;
  }
}

// One lane's share of a stream: sums[f][r] = sum over the lane's d of x[r, d] weights[f, d], chunk by chunk in order.
template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename T>
CLP_HOST_DEVICE void sum_stream(const X* x, const int64_t (&x_offset)[ROWS], const T* weights,
                                const int64_t (&w_offset)[FEATURES], int lane, int64_t D,
                                float (&sums)[FEATURES][ROWS]) {
#pragma unroll
  for (int f = 0; f < FEATURES; ++f)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[f][r] = 0.0f;
  // Two chunks in flight where the accumulators leave the registers for it.
#pragma unroll(ROWS * FEATURES <= 4 ? 2 : 1)
  for (int64_t d = lane * kChunk; d < D; d += kLanes * kChunk) {
    float w[FEATURES][kChunk];
#pragma unroll
    for (int f = 0; f < FEATURES; ++f) load_chunk<ALIGNED, true>(weights + w_offset[f], d, D, w[f]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x_row[kChunk];
      load_chunk<ALIGNED, false>(x + x_offset[r], d, D, x_row);
#pragma unroll
      for (int f = 0; f < FEATURES; ++f)
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sums[f][r] = fmaf(x_row[j], w[f][j], sums[f][r]);
    }
  }
}

// One lane's share of y without the bias, for ROWS rows and FEATURES features from the given ones on. Rows and features
// past the end repeat the last one; the caller does not store them.
template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename W>
CLP_HOST_DEVICE void sum_lane(const DecodeArguments<X, W>& a, int lane, int64_t first_row, int64_t first_feature,
                              float (&total)[FEATURES][ROWS]) {
  int64_t x_offset[ROWS], base_offset[FEATURES], deltas_offset[FEATURES];
  const float* coefficients[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t m = first_row + r < a.M ? first_row + r : a.M - 1;
    x_offset[r] = m * a.D;
    coefficients[r] = a.coefficients + a.row_map[m] * a.K;
  }
#pragma unroll
  for (int f = 0; f < FEATURES; ++f) {
    const int64_t n = first_feature + f < a.N ? first_feature + f : a.N - 1;
    base_offset[f] = n * a.D;
    deltas_offset[f] = n * a.K * a.D;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) total[f][r] = 0.0f;
  }
  if (a.base != nullptr) sum_stream<ROWS, FEATURES, ALIGNED>(a.x, x_offset, a.base, base_offset, lane, a.D, total);
  for (int64_t k = 0; k < a.K; ++k) {
    float sums[FEATURES][ROWS];
    sum_stream<ROWS, FEATURES, ALIGNED>(a.x, x_offset, a.deltas + k * a.D, deltas_offset, lane, a.D, sums);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float c = coefficients[r][k];
#pragma unroll
      for (int f = 0; f < FEATURES; ++f) total[f][r] = fmaf(c, sums[f][r], total[f][r]);
    }
  }
}

// Adds the bias terms to the reduced sum of one result and stores it; a row or feature past the end is dropped.
template <typename X, typename W>
CLP_HOST_DEVICE void store_result(const DecodeArguments<X, W>& a, int64_t m, int64_t n, float sum) {
  if (m >= a.M || n >= a.N) return;
  if (a.bias != nullptr) sum += widen(a.bias[n]);
  if (a.bias_deltas != nullptr) {
    const float* c = a.coefficients + a.row_map[m] * a.K;
    for (int64_t k = 0; k < a.K; ++k) sum = fmaf(c[k], widen(a.bias_deltas[n * a.K + k]), sum);
  }
  a.y[m * a.N + n] = narrow<X>(sum);
}

#ifdef __CUDACC__
// Grid: (blocks of ROWS rows, blocks of kWarps * FEATURES features), so that the row blocks of one feature run side by
// side and share its weights in L2; kWarps warps a block. Lane f * ROWS + r stores result (r, f).
template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename W>
__global__ void __launch_bounds__(kLanes* kWarps) mixed_linear_decode(const DecodeArguments<X, W> a) {
  static_assert(ROWS * FEATURES <= kLanes, "one lane stores one result");
  const int lane = threadIdx.x % kLanes;
  const int64_t first_feature = (int64_t(blockIdx.y) * kWarps + threadIdx.x / kLanes) * FEATURES;
  const int64_t first_row = int64_t(blockIdx.x) * ROWS;
  if (first_feature >= a.N) return;  // the whole warp leaves
  float total[FEATURES][ROWS];
  sum_lane<ROWS, FEATURES, ALIGNED>(a, lane, first_row, first_feature, total);
#pragma unroll
  for (int f = 0; f < FEATURES; ++f)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        total[f][r] += __shfl_xor_sync(0xffffffffu, total[f][r], distance);
      if (lane == f * ROWS + r) store_result(a, first_row + r, first_feature + f, total[f][r]);
    }
}
#endif

}  // namespace clp
