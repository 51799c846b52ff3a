// Device code of the Hopper kernel for the gradient of mixed_linear's deltas: rows of one weighting side by side.
//
//   d_deltas[n, k, d] = sum_s c[s, k] G_s[n, d],   G_s[n, d] = sum over the rows m of weighting s of dy[m, n] x[m, d]
//
// The products of one GEMM serve two copies: G_s stays in registers and goes into both sums, times their coefficients,
// where the rows of weighting s end. A cluster of 2 x 2 blocks owns 256 n x 256 d, a block 128 x 128 of them for two
// copies; each block copies half of its tiles and gets the other half by multicast. Rows are walked in order, in steps
// of 64; a step ends where the weighting changes, and the rows after it are set to zero in shared memory.
#pragma once

#include <type_traits>

#include "sm90_instructions.cuh"

namespace clp::sm90 {

constexpr int kGradientTile = 128, kGradientStep = 64, kGradientStages = 6, kGradientThreads = 384;
constexpr int kBoxBytes = 64 * kGradientStep * 2;  // 64 columns x 64 rows

struct GradientArguments {
  const float* coefficients;  // [S, K], strided
  const int32_t* row_map;     // [M], strided
  void* d_deltas;             // [N, K, D], contiguous
  int M, N, D, K;
  int stride_c_s, stride_c_k, stride_map;
};

struct GradientShared {
  uint8_t tiles[kGradientStages][4][kBoxBytes];  // dy, dy, x, x
  uint64_t full[kGradientStages], empty[kGradientStages];
};

// The walk over the rows: a step is the next rows of one weighting, at most 64. Every warp walks by itself, and reads the
// weightings three full steps ahead: a step takes about as long as one such read.
struct Walk {
  static constexpr int kAhead = 3;
  const int32_t* row_map;
  int stride, M, lane;
  int start = 0, count = 0, weighting = -1;
  int ahead[kAhead][2];

  __device__ Walk(const GradientArguments& p, int lane_)
      : row_map(p.row_map), stride(p.stride_map), M(p.M), lane(lane_) {
    look_ahead(0);
  }
  __device__ __forceinline__ void look(int (&weightings)[2], int from) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = from + i * 32 + lane;
      weightings[i] = m < M ? row_map[int64_t(m) * stride] : -1;
    }
  }
  __device__ __forceinline__ void look_ahead(int from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) look(ahead[i], from + i * kGradientStep);
  }
  __device__ __forceinline__ bool next() {
    start += count;
    if (start >= M) return false;
    weighting = __shfl_sync(0xffffffffu, ahead[0][0], 0);
    const uint32_t others[2] = {__ballot_sync(0xffffffffu, ahead[0][0] != weighting),
                                __ballot_sync(0xffffffffu, ahead[0][1] != weighting)};
    count = others[0] != 0 ? __ffs(others[0]) - 1 : others[1] != 0 ? 31 + __ffs(others[1]) : kGradientStep;
    if (count < kGradientStep) {
      look_ahead(start + count);
    } else {
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) ahead[i][0] = ahead[i + 1][0], ahead[i][1] = ahead[i + 1][1];
      look(ahead[kAhead - 1], start + kAhead * kGradientStep);
    }
    return true;
  }
};

// Stores two neighbours, or adds them to what is there.
template <bool ADDS>
__device__ __forceinline__ void store_pair(float* to, float2 pair) {
  if (ADDS) {
    const float2 old = *reinterpret_cast<const float2*>(to);
    pair.x += old.x, pair.y += old.y;
  }
  *reinterpret_cast<float2*>(to) = pair;
}

template <bool ADDS>
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float2 pair) {
  if (ADDS) {
    const float2 old = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(to));
    pair.x += old.x, pair.y += old.y;
  }
  *reinterpret_cast<__nv_bfloat162*>(to) = __float22bfloat162_rn(pair);
}

template <typename T, typename W, bool ADDS>
__global__ void __cluster_dims__(2, 2, 1) __launch_bounds__(kGradientThreads, 1)
    mixed_linear_segments_gradient(const __grid_constant__ CUtensorMap map_dy, const __grid_constant__ CUtensorMap map_x,
                                   const GradientArguments p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) uint8_t memory[];
  GradientShared& shared = *reinterpret_cast<GradientShared*>(memory);
  const uint32_t rank = cluster_rank(), n_rank = rank % 2, d_rank = rank / 2;
  const int first_n = blockIdx.x * kGradientTile, first_d = blockIdx.y * kGradientTile;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGradientStages; ++i) {
      init_barrier(shared_address(&shared.full[i]), 1);
      init_barrier(shared_address(&shared.empty[i]), 2 * 3);
    }
    publish_barriers();
  }
  __syncthreads();
  synchronize_cluster();
  Walk walk(p, lane);
  int stage = 0;
  uint32_t parity = 0;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x / 32 == 0) {
      const uint16_t same_n = 0b0101 << n_rank, same_d = 0b0011 << (d_rank * 2);
      while (walk.next()) {
        if (lane == 0) {
          const uint32_t barrier = shared_address(&shared.full[stage]);
          wait_for(shared_address(&shared.empty[stage]), parity ^ 1);
          expect_bytes(barrier, 4 * kBoxBytes);
          copy_box(shared_address(shared.tiles[stage][d_rank]), &map_dy, barrier, same_n, first_n + d_rank * 64,
                   walk.start);
          copy_box(shared_address(shared.tiles[stage][2 + n_rank]), &map_x, barrier, same_d, first_d + n_rank * 64,
                   walk.start);
        }
        __syncwarp();
        if (++stage == kGradientStages) stage = 0, parity ^= 1;
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int k = blockIdx.z * 2, thread = threadIdx.x - 128;
    const bool has_second = k + 1 < p.K;
    float product[64], first[64], second[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) product[i] = first[i] = second[i] = 0.0f;
    int before = -1, summed = -1;
    const auto release = [&](int which) {
      // One arrival of a warpgroup: its products end together. Warp i tells block i of the cluster.
      const int other = threadIdx.x / 32 % 4;
      if (lane == 0 && (other % 2 == n_rank || other / 2 == d_rank)) arrive_at(shared_address(&shared.empty[which]), other);
    };
    const auto add_product = [&] {
      const float* c = p.coefficients + int64_t(summed) * p.stride_c_s + int64_t(k) * p.stride_c_k;
      const float c_first = c[0], c_second = has_second ? c[p.stride_c_k] : 0.0f;
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        first[i] = fmaf(c_first, product[i], first[i]);
        second[i] = fmaf(c_second, product[i], second[i]);
        product[i] = 0.0f;
      }
    };
    while (walk.next()) {
      if (walk.weighting != summed) {
        wait_for_products<0>();
        if (summed >= 0) add_product();
        summed = walk.weighting;
      }
      const uint32_t dy = shared_address(shared.tiles[stage][group - 1]), x = shared_address(shared.tiles[stage][2]);
      wait_for(shared_address(&shared.full[stage]), parity);
      if (walk.count < kGradientStep) {
        for (int i = thread; i < kGradientStep * 16; i += 256)
          if (i / 16 >= walk.count)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(x + i % 16 / 8 * kBoxBytes + i / 16 * 128 +
                                                                         i % 8 * 16),
                         "r"(0)
                         : "memory");
        publish_stores();
        asm volatile("fence.acq_rel.cluster;" ::: "memory");  // the next copy into these rows may be another block's
        asm volatile("bar.sync 1, 256;" ::: "memory");
      }
      begin_products();
#pragma unroll
      for (int step = 0; step < kGradientStep / 16; ++step)
        multiply_transposed(product, describe_matrix(dy + step * 2048), describe_matrix(x + step * 2048, kBoxBytes), T{});
      commit_products();
      wait_for_products<1>();
      if (before >= 0) release(before);
      before = stage;
      if (++stage == kGradientStages) stage = 0, parity ^= 1;
    }
    wait_for_products<0>();
    if (summed >= 0) add_product();
    W* out = static_cast<W*>(p.d_deltas);
    const int n = first_n + (group - 1) * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4, d = first_d + lane % 4 * 2;
    // The copy engine took rows of whole 16 bytes: D is even, and a pair is in or out.
    const auto store = [&](const float(&sums)[64], int copy) {
#pragma unroll
      for (int i = 0; i < 64; i += 2) {
        const int row = n + i / 2 % 2 * 8, column = d + i / 4 * 8;
        if (row < p.N && column < p.D)
          store_pair<ADDS>(out + (int64_t(row) * p.K + copy) * p.D + column, make_float2(sums[i], sums[i + 1]));
      }
    };
    store(first, k);
    if (has_second) store(second, k + 1);
  }
  synchronize_cluster();  // no block leaves while another may still arrive at its barriers
#endif
}

}  // namespace clp::sm90
