// The left operand of Hopper's mixed_linear: a tile of weights from shared memory, mixed in registers.
#pragma once

#include <cuda_bf16.h>

#include <climits>
#include <type_traits>

#include "sm90_instructions.cuh"

namespace clp::sm90 {

using Row = __nv_bfloat16;  // what rows and base are of

constexpr int kTileOuts = 128, kTileRows = 256, kTileReduced = 64;
constexpr int kClusterOuts = 2, kClusterRows = 2, kClusterBlocks = kClusterOuts * kClusterRows;
constexpr int kConsumerWarps = 8, kThreads = 384;
constexpr int kRowsBytes = kTileRows * kTileReduced * 2;
constexpr int kWeightsBytes = kTileOuts * kTileReduced * 2;  // of one stream
constexpr int kSharedLimit = 224 * 1024;  // for tiles, of the 227 KiB that a block may have
constexpr int kNone = INT_MAX;

// Two bfloat16s of a word; the first is the lower half.
__device__ __forceinline__ float2 widen_pair(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

__device__ __forceinline__ float widen_one(float value) { return value; }
__device__ __forceinline__ float widen_one(Row value) { return __bfloat162float(value); }

// Where a lane finds its rows of an A fragment of 64 outputs x 16 in a swizzled tile of one stream.
template <bool TRANSPOSED>
struct FragmentAddress {
  uint32_t offset, column;
  __device__ explicit FragmentAddress(int group, int warp, int lane) {
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (TRANSPOSED) {  // tiles of 64 outputs, rows of the reduced dimension
      offset = group * (kWeightsBytes / 2) + ((matrix >> 1) * 8 + row) * 128;
      column = ((warp * 2 + (matrix & 1)) ^ row) * 16;
    } else {
      offset = (group * 64 + warp * 16 + (matrix & 1) * 8 + row) * 128;
      column = (matrix >> 1) ^ row;
    }
  }
  __device__ __forceinline__ uint32_t at(uint32_t tile, int step) const {
    if constexpr (TRANSPOSED)
      return tile + offset + step * 16 * 128 + column;
    else
      return tile + offset + ((column ^ (step * 2)) * 16);
  }
};

// The same in tiles of float32, which hold 32 columns a row of 128 bytes: 8 elements of a fragment, in the same order.
template <bool TRANSPOSED>
struct WideFragmentAddress {
  int out, pair;  // of 64 outputs; of 4 pairs of the reduced dimension
  uint32_t group;
  __device__ WideFragmentAddress(int group_, int warp, int lane)
      : out(warp * 16 + lane / 4), pair(lane % 4), group(group_) {}
  // Tiles: 32 of the reduced dimension x 128 outputs, two of them; TRANSPOSED: 32 outputs x 64, four of them.
  __device__ __forceinline__ void load(float (&values)[8], uint32_t tile, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int o = out + i % 2 * 8, r = i / 2 * 8 + pair * 2;  // within 64 outputs, within 16
      if constexpr (TRANSPOSED) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = step * 16 + r + e;
          const uint32_t address =
              tile + (group * 2 + o / 32) * 64 * 128 + row * 128 + ((o % 32 / 4) ^ (row % 8)) * 16 + o % 4 * 4;
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(values[2 * i + e]) : "r"(address) : "memory");
        }
      } else {
        const int column = step % 2 * 16 + r;
        const uint32_t address = tile + step / 2 * kTileOuts * 128 + (group * 64 + o) * 128 +
                                 ((column / 4) ^ (o % 8)) * 16 + column % 4 * 4;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(values[2 * i]), "=f"(values[2 * i + 1])
                     : "r"(address)
                     : "memory");
      }
    }
  }
};

// A fragment of 64 outputs x 64 of the mix, as the tensor cores take it from registers.
template <typename W, int K, bool HAS_BASE, bool EXACT, bool TRANSPOSED>
struct Mix {
  static constexpr bool kBaseApart = EXACT && HAS_BASE;
  static constexpr bool kHasLow = EXACT && !HAS_BASE;
  static constexpr int kSteps = kTileReduced / 16;
  static constexpr int kDeltaBytes = kWeightsBytes * sizeof(W) / 2;
  uint32_t high[kSteps][4], low[kHasLow ? kSteps : 1][4];

  __device__ __forceinline__ void load(uint32_t tiles, const FragmentAddress<TRANSPOSED>& where,
                                       const WideFragmentAddress<TRANSPOSED>& wide, const float (&c)[K]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float sums[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = 0.0f;
      if constexpr (HAS_BASE && !kBaseApart) add(sums, 1.0f, where.at(tiles + K * kDeltaBytes, step));
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if constexpr (std::is_same_v<W, float>) {
          float values[8];
          wide.load(values, tiles + k * kDeltaBytes, step);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[i] = fmaf(c[k], values[i], sums[i]);
        } else {
          add(sums, c[k], where.at(tiles + k * kDeltaBytes, step));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high[step][i] = narrow_pair(sums[2 * i], sums[2 * i + 1]);
        if constexpr (kHasLow) {
          const float2 pair = widen_pair(high[step][i]);
          low[step][i] = narrow_pair(sums[2 * i] - pair.x, sums[2 * i + 1] - pair.y);
        }
      }
    }
  }

  __device__ __forceinline__ void add(float (&sums)[8], float c, uint32_t address) {
    uint32_t words[4];
    load_fragment<TRANSPOSED>(words, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen_pair(words[i]);
      sums[2 * i] = fmaf(c, pair.x, sums[2 * i]);
      sums[2 * i + 1] = fmaf(c, pair.y, sums[2 * i + 1]);
    }
  }

  // Starts sums += (mix [+ base]) rows^T and leaves it running.
  __device__ __forceinline__ void multiply_rows(float (&sums)[128], uint32_t rows, uint32_t base) {
    // The mix must be in its registers before the fence.
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile("" : "+r"(high[step][i])::"memory");
        if constexpr (kHasLow) asm volatile("" : "+r"(low[step][i])::"memory");
      }
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t b = describe_matrix(rows + step * 32);
      if constexpr (kBaseApart)
        multiply<TRANSPOSED>(sums, describe_matrix(base + step * (TRANSPOSED ? 16 * 128 : 32)), b);
      multiply(sums, high[step], b);
      if constexpr (kHasLow) multiply(sums, low[step], b);
    }
    commit_products();
  }
};

}  // namespace clp::sm90
