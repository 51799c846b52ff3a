// Device code of the Hopper kernel of mixed_linear: many rows per weighting, bound by arithmetic.
//
//   out[m, o] = sum_r a[m, r] (base[o, r] + sum_k c[m, k] deltas[o, k, r]) + bias[o] + sum_k c[m, k] bias_deltas[o, k]
//
// or, TRANSPOSED (the gradient to x), with weights indexed [r, o] and no bias. c[m, k] = coefficients[row_map[m], k].
//
// A cluster of 2 x 2 blocks owns 512 rows x 256 outputs, a block 256 x 128 of them. Each block copies half of the tiles
// that it needs and its neighbours get them by multicast: K + 1 streams of weights make the traffic from L2 the limit.
// Two warpgroups multiply 64 outputs each: the weights are the left operand, mixed in registers in float32 and rounded
// once; the rows are the right operand, in shared memory. A third warpgroup's only thread feeds the copy engine.
//
// EXACT: the base is an operand of its own beside the mix of the deltas (without a base, the mix is its rounding and the
// rounding of the rest), so a delta keeps its effect however small it is. Otherwise base and deltas are one mix.
//
// The cluster walks over the reduced dimension once per weighting of its rows; the rows of the others are set to zero
// in shared memory, so a row's bits do not depend on its neighbours' weightings.
#pragma once

#include "mixed_linear_sm90_mix.cuh"

namespace clp::sm90 {

// Two rings of tiles: what is mixed is free again as soon as it is in registers, what the tensor cores read later.
template <typename W, int K, bool HAS_BASE, bool EXACT>
struct Rings {
  static constexpr bool kBaseApart = HAS_BASE && EXACT;
  static constexpr int kDeltaBytes = kWeightsBytes * sizeof(W) / 2;
  static constexpr int kMixedBytes = K * kDeltaBytes + (HAS_BASE && !EXACT) * kWeightsBytes;
  static constexpr int kReadBytes = kRowsBytes + kBaseApart * kWeightsBytes;
  static constexpr int kMixedStages = kSharedLimit - 2 * kMixedBytes >= 2 * kReadBytes ? 2 : 1;
  static constexpr int kFit = (kSharedLimit - kMixedStages * kMixedBytes) / kReadBytes;
  static constexpr int kReadStages = kFit < 4 ? kFit : 4;
  static constexpr int kTilesBytes = kMixedStages * kMixedBytes + kReadStages * kReadBytes;
  static_assert(kClusterBlocks == 4);
  static_assert(kReadStages >= 2 && kTileRows * kTileOuts * 2 <= kTilesBytes);
};

// A block's shared memory. Tiles come first: the swizzle wants them at multiples of 1024 bytes.
template <typename R>
struct Shared {
  uint8_t tiles[R::kTilesBytes];
  uint64_t mixed_full[R::kMixedStages], mixed_empty[R::kMixedStages];
  uint64_t read_full[R::kReadStages], read_empty[R::kReadStages];
  int weightings[kTileRows * kClusterRows];
};

template <int STAGES>
struct Position {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

struct SegmentArguments {
  const float* coefficients;  // [S, K], strided
  const int32_t* row_map;     // [M]
  const void* bias;           // [O] in the rows' dtype, or null
  const void* bias_deltas;    // [O, K] in the deltas' dtype, contiguous, or null
  void* out;                  // [M, O], contiguous
  int M, O, R;
  int stride_c_s, stride_c_k, stride_map;
};

// The smallest weighting above `last` of the cluster's rows, kNone after the last; the same in every lane.
__device__ __forceinline__ int next_weighting(const int* weightings, int last) {
  int next = kNone;
  for (int i = threadIdx.x % 32; i < kTileRows * kClusterRows; i += 32)
    if (weightings[i] > last) next = min(next, weightings[i]);
  return __reduce_min_sync(0xffffffffu, next);
}

// Sets the rows of other weightings to zero in a tile of rows; thread i of the consumers takes row i.
__device__ __forceinline__ void clear_other_rows(uint32_t rows, bool is_mine) {
  if (!is_mine)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(rows + (threadIdx.x - 128) * 128 + i * 16), "r"(0)
                   : "memory");
  publish_stores();
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

template <typename W, int K, bool HAS_BASE, bool EXACT, bool TRANSPOSED>
__global__ void __cluster_dims__(kClusterRows, kClusterOuts, 1) __launch_bounds__(kThreads, 1)
    mixed_linear_segments(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_base,
                          const __grid_constant__ CUtensorMap map_deltas, const SegmentArguments p) {
#if __CUDA_ARCH__ >= 900
  using R = Rings<W, K, HAS_BASE, EXACT>;
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<R>& shared = *reinterpret_cast<Shared<R>*>(memory);
  uint64_t *const mixed_full = shared.mixed_full, *const mixed_empty = shared.mixed_empty;
  uint64_t *const read_full = shared.read_full, *const read_empty = shared.read_empty;
  int* const weightings = shared.weightings;
  const uint32_t mixed_tiles = shared_address(shared.tiles);
  const uint32_t read_tiles = mixed_tiles + R::kMixedStages * R::kMixedBytes;
  const uint32_t rank = cluster_rank(), row_rank = rank % kClusterRows, out_rank = rank / kClusterRows;
  const int first_row = blockIdx.x * kTileRows, first_out = blockIdx.y * kTileOuts;
  const int cluster_row = (blockIdx.x - row_rank) * kTileRows;
  const int steps = (p.R + kTileReduced - 1) / kTileReduced;
  const int group = threadIdx.x / 128;  // 0: producer

  for (int i = threadIdx.x; i < kTileRows * kClusterRows; i += kThreads)
    weightings[i] = cluster_row + i < p.M ? p.row_map[int64_t(cluster_row + i) * p.stride_map] : kNone;
  if (threadIdx.x == 0) {
    for (int i = 0; i < R::kMixedStages; ++i) {
      init_barrier(shared_address(&mixed_full[i]), 1);
      init_barrier(shared_address(&mixed_empty[i]), kConsumerWarps * kClusterRows);
    }
    for (int i = 0; i < R::kReadStages; ++i) {
      init_barrier(shared_address(&read_full[i]), 1);
      init_barrier(shared_address(&read_empty[i]), kConsumerWarps * (kClusterRows + kClusterOuts - 1));
    }
    publish_barriers();
  }
  __syncthreads();
  synchronize_cluster();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x / 32 == 0) {
      // Blocks that share this one's outputs (weights) and its rows; bit = rank in the cluster.
      const uint16_t same_outs = ((1 << kClusterRows) - 1) << (out_rank * kClusterRows);
      const uint16_t same_rows = (1 | 1 << kClusterRows) << row_rank;
      const int o = first_out + row_rank * (kTileOuts / kClusterRows);
      const int own_rows = first_row + out_rank * (kTileRows / kClusterOuts);
      Position<R::kMixedStages> mixed;
      Position<R::kReadStages> read;
      for (int weighting = next_weighting(weightings, -1); weighting != kNone;
           weighting = next_weighting(weightings, weighting)) {
        for (int step = 0; step < steps; ++step, mixed.advance(), read.advance()) {
          if (threadIdx.x != 0) continue;
          const int r = step * kTileReduced, x = TRANSPOSED ? o : r, z = TRANSPOSED ? r : o;
          {
            const uint32_t barrier = shared_address(&mixed_full[mixed.stage]);
            const uint32_t tile = mixed_tiles + mixed.stage * R::kMixedBytes, half = row_rank * (kTileOuts / 2) * 128;
            wait_for(shared_address(&mixed_empty[mixed.stage]), mixed.parity ^ 1);  // at first: free
            expect_bytes(barrier, R::kMixedBytes);
#pragma unroll
            for (int k = 0; k < K; ++k) {
              const uint32_t to = tile + k * R::kDeltaBytes;
              if constexpr (std::is_same_v<W, float>) {  // 32 columns a box
                constexpr uint32_t kNext = TRANSPOSED ? 64 * 128 : kTileOuts * 128;
                const uint32_t first = to + (TRANSPOSED ? 2 : 1) * half;
                copy_box(first, &map_deltas, barrier, same_outs, x, k, z);
                copy_box(first + kNext, &map_deltas, barrier, same_outs, x + 32, k, z);
              } else {
                copy_box(to + half, &map_deltas, barrier, same_outs, x, k, z);
              }
            }
            if constexpr (HAS_BASE && !EXACT)
              copy_box(tile + K * R::kDeltaBytes + half, &map_base, barrier, same_outs, x, z);
          }
          const uint32_t barrier = shared_address(&read_full[read.stage]);
          const uint32_t tile = read_tiles + read.stage * R::kReadBytes;
          wait_for(shared_address(&read_empty[read.stage]), read.parity ^ 1);
          expect_bytes(barrier, R::kReadBytes);
          copy_box(tile + out_rank * (kRowsBytes / kClusterOuts), &map_a, barrier, same_rows, r, own_rows);
          if constexpr (R::kBaseApart)
            copy_box(tile + kRowsBytes + row_rank * (kWeightsBytes / kClusterRows), &map_base, barrier, same_outs, x, z);
        }
        __syncwarp();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const FragmentAddress<TRANSPOSED> where(group - 1, warp, lane);
    const WideFragmentAddress<TRANSPOSED> wide(group - 1, warp, lane);
    const int* own = weightings + row_rank * kTileRows;
    Position<R::kMixedStages> mixed;
    Position<R::kReadStages> read;
    Mix<W, K, HAS_BASE, EXACT, TRANSPOSED> even, odd;
    float sums[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] = 0.0f;

    int weighting = next_weighting(weightings, -1), step = 0;
    bool is_alone = true, is_mine = true, next_is_alone = true, next_is_mine = true;
    float c[K];
    // Mixes the next tile of weights; false after the last one.
    auto mix_next = [&](auto& mix) {
      if (weighting == kNone) return false;
      if (step == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          c[k] = p.coefficients[int64_t(weighting) * p.stride_c_s + int64_t(k) * p.stride_c_k];
        bool is_alone_here = true;
        for (int i = lane; i < kTileRows; i += 32) is_alone_here &= own[i] == weighting || own[i] == kNone;
        next_is_alone = __all_sync(0xffffffffu, is_alone_here);
        next_is_mine = own[threadIdx.x - 128] == weighting;
      }
      wait_for(shared_address(&mixed_full[mixed.stage]), mixed.parity);
      mix.load(mixed_tiles + mixed.stage * R::kMixedBytes, where, wide, c);
      __syncwarp();
      if (lane == 0)
#pragma unroll
        for (int other = 0; other < kClusterRows; ++other)
          arrive_at<false>(shared_address(&mixed_empty[mixed.stage]), out_rank * kClusterRows + other);
      mixed.advance();
      if (++step == steps) step = 0, weighting = next_weighting(weightings, weighting);
      return true;
    };
    // Multiplies with what was mixed, mixes the next tile meanwhile; false after the last one.
    auto multiply_and_mix = [&](auto& mix, auto& next) {
      const uint32_t rows = read_tiles + read.stage * R::kReadBytes;
      is_alone = next_is_alone, is_mine = next_is_mine;
      wait_for(shared_address(&read_full[read.stage]), read.parity);
      if (!is_alone) clear_other_rows(rows, is_mine);
      mix.multiply_rows(sums, rows, rows + kRowsBytes + (group - 1) * (kWeightsBytes / 2));
      const bool has_next = mix_next(next);
      wait_for_products<0>();
      __syncwarp();
      if (lane == 0)
#pragma unroll
        for (int other = 0; other < kClusterBlocks; ++other)
          if (other % kClusterRows == row_rank || other / kClusterRows == out_rank) {
            if (is_alone)
              arrive_at<false>(shared_address(&read_empty[read.stage]), other);
            else
              arrive_at<true>(shared_address(&read_empty[read.stage]), other);
          }
      read.advance();
      return has_next;
    };
    if (mix_next(even))
      while (multiply_and_mix(even, odd) && multiply_and_mix(odd, even)) {
      }
    asm volatile("bar.sync 1, 256;" ::: "memory");  // both groups have read the last tiles: the result takes their memory
    const uint32_t tiles = mixed_tiles;
    // [rows, outputs] in shared memory, rows of 256 bytes; 16-byte columns are permuted against bank conflicts.
    const Row* bias = static_cast<const Row*>(p.bias);
    const W* bias_deltas = static_cast<const W*>(p.bias_deltas);
    const int out = first_out + (group - 1) * 64 + warp * 16 + lane / 4;
    float bias_of[2] = {0.0f, 0.0f};
    if (bias != nullptr)
      for (int i = 0; i < 2; ++i)
        if (out + i * 8 < p.O) bias_of[i] = widen_one(bias[out + i * 8]);
#pragma unroll
    for (int j = 0; j < kTileRows / 8; j += 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[4 * j + i] += bias_of[(i / 2) % 2];
      if (bias_deltas != nullptr)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int weighting = own[(j + i / 4) * 8 + lane % 4 * 2 + i % 2], o = out + (i / 2) % 2 * 8;
          if (weighting != kNone && o < p.O)
            for (int k = 0; k < K; ++k)
              sums[4 * j + i] = fmaf(p.coefficients[int64_t(weighting) * p.stride_c_s + int64_t(k) * p.stride_c_k],
                                     widen_one(bias_deltas[int64_t(o) * K + k]), sums[4 * j + i]);
        }
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = narrow_pair(sums[4 * j + 2 * i], sums[4 * j + 2 * i + 1]);
      // Matrices: (rows j, outs 0-7), (rows j, outs 8-15), (rows j + 1, outs 0-7), (rows j + 1, outs 8-15).
      const int row = (j + lane / 16) * 8 + lane % 8, column = (group - 1) * 8 + warp * 2 + lane / 8 % 2;
      store_transposed(tiles + row * 256 + ((column ^ (row % 8)) * 16), words);
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");
    Row* result = static_cast<Row*>(p.out);
    const bool is_aligned = p.O % 8 == 0;
    for (int i = threadIdx.x - 128; i < kTileRows * 16; i += 256) {
      const int row = i / 16, column = i % 16, o = first_out + column * 8;
      if (first_row + row >= p.M || o >= p.O) continue;
      uint4 words;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                   : "r"(tiles + row * 256 + ((column ^ (row % 8)) * 16))
                   : "memory");
      Row* to = result + int64_t(first_row + row) * p.O + o;
      if (is_aligned) {
        *reinterpret_cast<uint4*>(to) = words;
      } else {
        const Row* values = reinterpret_cast<const Row*>(&words);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (o + e < p.O) to[e] = values[e];
      }
    }
  }
  synchronize_cluster();  // no block leaves while another may still arrive at its barriers
#endif
}

}  // namespace clp::sm90
