// Tensor-core form of the CUDA decode kernel of mixed_linear: 16-bit rows and weights of one dtype, D a multiple of 8.
// The operator, its arguments and the legend are in mixed_linear_sm80.cuh.
//
// The kernel's job is to read (K + 1) N D weights once at the memory's speed; a few rows cost next to nothing beside it.
//
// - A block owns a few features and all rows. Its warps take the chunks of D in turn (warp w: chunks w, w + kWarps, ...)
//   and, within a chunk, the base and then the copies, so that a chunk of x is read once for all K + 1 streams.
// - mma.m16n8k16 adds in float32; x^T is its left operand (16 rows), the weights the right one (8 features). After the
//   share of a stream in a chunk, total += c[m, k] * sum: the mix of weights is never formed and never rounded.
// - The reduced index may be permuted as long as both operands agree. A lane supplies row or feature g = lane / 4 and the
//   pairs t = lane % 4 and t + 4 of a step of 16; it takes them from one 16-byte load, elements 8t .. 8t + 7 of the 32 of
//   two steps. So no lane ever needs another's weights: what a lane copies into shared memory it reads back itself, and
//   the copies in flight (kDepth of them, cp.async) need no barrier and no registers.
// - Warps' totals meet in shared memory and are added in the warps' order.
//
// Order and grouping of every sum depend on D and K alone. A row's bits are the same for every M, position in the batch
// and neighbour, and for every tile below: kRows, kTiles and kDepth do not change them; kWarps and kChunk would.
//
// run_warp is written for a machine of kLanes lanes: one on a GPU, where every thread runs it, and 32 in the tests, which
// run a whole warp on the host and check what is read against what has been copied by then.
#pragma once

#include "mixed_linear_sm80.cuh"

namespace clp {

// ROWS rows (8, or a multiple of 16) and TILES groups of 8 features a block, CHUNK elements of D a warp takes at a time,
// DEPTH shares of a chunk in flight a warp. BLOCKS: blocks on a multiprocessor that the registers shall allow.
template <int ROWS, int TILES, int DEPTH, int WARPS, int CHUNK, int BLOCKS>
struct MmaTile {
  static constexpr int kRows = ROWS, kTiles = TILES, kDepth = DEPTH, kWarps = WARPS, kChunk = CHUNK, kBlocks = BLOCKS;
  static constexpr int kFeatures = 8 * TILES;
  static constexpr int kStride = WARPS * CHUNK;  // from a warp's chunk to its next
  static constexpr int kRowGroups = ROWS / 8;
  static constexpr int kRowTiles = (kRowGroups + 1) / 2;
  static constexpr int kVectors = CHUNK / 32;          // of 16 bytes: a lane's part of a chunk of one row or feature
  static constexpr int kSlot = TILES * kVectors * 32;  // of 16 bytes: a warp's share of one stream in a chunk
  // One more than are in flight: the slot that a copy fills is not the one that is being read.
  static constexpr int kRing = (DEPTH + 1) * kSlot;
  static constexpr int kSharedBytes = WARPS * kRing * 16;
  // Few rows leave registers for the next chunk of x; many are read when they are needed, from L1 or L2.
  static constexpr bool kReadsAhead = ROWS <= 16;
  static_assert(ROWS == 8 || ROWS % 16 == 0, "whole left operands, or half of one");
  static_assert(CHUNK % 32 == 0, "16 bytes a lane");
  static_assert(ROWS * kFeatures * 4 <= kRing * 16, "a warp's totals take the place of its ring");
};

// The launcher's choices. The last two figures but one are part of every result's bits.
using MmaFew = MmaTile<8, 1, 6, 4, 128, 4>;
using MmaSome = MmaTile<16, 1, 6, 4, 128, 4>;
using MmaMore = MmaTile<32, 2, 5, 4, 128, 2>;
using MmaMany = MmaTile<64, 2, 5, 4, 128, 1>;

using Words = Vector<uint32_t>;  // 8 elements of 16 bits

// A share in a warp's sequence: its first element of D, its stream (the base first, if there is one), its slot's offset in
// the ring.
struct Share {
  int d, stream, slot;
};

template <class TILE>
CLP_HOST_DEVICE void advance(Share& share, int streams) {
  share.slot = share.slot == TILE::kDepth * TILE::kSlot ? 0 : share.slot + TILE::kSlot;
  if (++share.stream == streams) {
    share.stream = 0;
    share.d += TILE::kStride;
  }
}

template <typename T, class TILE>
struct Lane {
  int index;                // in the warp
  int row;                  // of x: the first of those that this lane supplies
  const T* x;               // at this lane's first element
  const T *base, *deltas;   // at what it copies next of its first feature
  const float* coefficients[TILE::kRowGroups];  // of its rows
  float c[TILE::kRowGroups], next_c[TILE::kRowGroups];  // of the stream at hand, of the next
  Words rows[TILE::kRowGroups][TILE::kVectors], next_rows[TILE::kRowGroups][TILE::kVectors];
  Words weights[TILE::kTiles][TILE::kVectors];
  float sums[TILE::kRowTiles][TILE::kTiles][4];    // of the stream's share of a chunk
  float totals[TILE::kRowTiles][TILE::kTiles][4];  // rows g, g, g + 8, g + 8; features 2t, 2t + 1, 2t, 2t + 1
};

template <typename T, class TILE>
CLP_HOST_DEVICE void start_lane(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int index, int warp, int first_row,
                                int first_feature) {
  const int g = index / 4, first = index % 4 * 8, chunk = warp * TILE::kChunk;
  lane.index = index;
  lane.row = first_row + g;
  lane.x = a.x + first;
  lane.base = a.base == nullptr ? nullptr : a.base + (first_feature + g) * a.D + first + chunk;
  lane.deltas = a.deltas + (first_feature + g) * a.K * a.D + first + chunk;
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.totals[i][f][j] = 0.0f;
}

// The row of group i, or the last one in the place of rows past the end, whose results are dropped.
template <typename T, class TILE>
CLP_HOST_DEVICE int find_row(const Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int i) {
  const int row = lane.row + 8 * i, last = int(a.M) - 1;
  return row < last ? row : last;
}

// Apart from start_lane: two dependent loads, which may run beside the first weights' copies.
template <typename T, class TILE>
CLP_HOST_DEVICE void find_coefficients(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i)
    lane.coefficients[i] = a.coefficients + a.row_map[find_row(lane, a, i)] * a.K;
}

template <typename T, class TILE>
CLP_HOST_DEVICE void read_coefficients(Lane<T, TILE>& lane, int k) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) lane.next_c[i] = k < 0 ? 1.0f : lane.coefficients[i][k];
}

// Starts the copies of one share and moves the lane's source to the next one; zeros past the end of D.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void copy_weights(MACHINE& machine, Lane<T, TILE>& lane, const DecodeArguments<T, T>& a,
                                  const Share& share, Words* ring) {
  const int K = int(a.K), D = int(a.D), k = share.stream - (a.base != nullptr);
  const T* source = k < 0 ? lane.base : lane.deltas;
  const int64_t stride = int64_t(8 * D) * (k < 0 ? 1 : K);
  Words* slot = ring + share.slot + lane.index;
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v) {
      Words* target = slot + (f * TILE::kVectors + v) * 32;
      if (share.d + TILE::kChunk <= D) {
        machine.copy(target, source + f * stride + 32 * v);
      } else {
        const bool inside = share.d + 32 * v + lane.index % 4 * 8 < D;
        machine.copy_or_clear(target, inside ? source + f * stride + 32 * v : a.deltas, inside);
      }
    }
  if (k < 0) lane.base += TILE::kStride;
  if (k >= 0) lane.deltas += k == K - 1 ? TILE::kStride - int64_t(K - 1) * D : D;
}

template <class TILE, typename T>
CLP_HOST_DEVICE void read_rows(const Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int d,
                               Words (&rows)[TILE::kRowGroups][TILE::kVectors]) {
  const int D = int(a.D);
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) {
    const T* source = lane.x + (int64_t(find_row(lane, a, i)) * D + d);
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v) {
      rows[i][v] = Words{};
      if (d + 32 * v + lane.index % 4 * 8 < D)
        rows[i][v] = load_vector<false>(reinterpret_cast<const uint32_t*>(source + 32 * v));
    }
  }
}

// Makes the chunk of x at d the one at hand.
template <typename T, class TILE>
CLP_HOST_DEVICE void take_rows(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int d) {
  if constexpr (TILE::kReadsAhead) {
#pragma unroll
    for (int i = 0; i < TILE::kRowGroups; ++i)
#pragma unroll
      for (int v = 0; v < TILE::kVectors; ++v) lane.rows[i][v] = lane.next_rows[i][v];
    read_rows<TILE>(lane, a, d + TILE::kStride, lane.next_rows);
  } else {
    read_rows<TILE>(lane, a, d, lane.rows);
  }
}

template <typename T, class TILE>
CLP_HOST_DEVICE void read_weights(Lane<T, TILE>& lane, const Words* ring, int slot) {
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f) {
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v)
      lane.weights[f][v] = ring[slot + (f * TILE::kVectors + v) * 32 + lane.index];
#pragma unroll
    for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.sums[i][f][j] = 0.0f;
  }
}

// A lane's registers of step `half` of the two in a vector: pairs t and t + 4 of rows g and g + 8, and of feature g.
template <typename T, class TILE>
CLP_HOST_DEVICE void left_operand(const Lane<T, TILE>& lane, int i, int v, int half, uint32_t (&words)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    words[j] = 2 * i + j % 2 < TILE::kRowGroups ? lane.rows[2 * i + j % 2][v].element[2 * half + j / 2] : 0;
}

template <typename T, class TILE>
CLP_HOST_DEVICE void right_operand(const Lane<T, TILE>& lane, int f, int v, int half, uint32_t (&words)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) words[j] = lane.weights[f][v].element[2 * half + j];
}

template <typename T, class TILE>
CLP_HOST_DEVICE void mix_stream(Lane<T, TILE>& lane) {
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (2 * i + j / 2 < TILE::kRowGroups)
          lane.totals[i][f][j] = fmaf(lane.c[2 * i + j / 2], lane.sums[i][f][j], lane.totals[i][f][j]);
}

// The last block starts early enough to be whole (N >= kFeatures): what two blocks compute has the same bits.
template <class TILE, typename T>
CLP_HOST_DEVICE int find_first_feature(const DecodeArguments<T, T>& a, int block) {
  const int feature = block * TILE::kFeatures, last = int(a.N) - TILE::kFeatures;
  return feature < last ? feature : last;
}

// One warp's share of y without the bias, into its lanes' totals.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void run_warp(MACHINE& machine, const DecodeArguments<T, T>& a, int warp, int first_row,
                              int first_feature, Words* ring, Lane<T, TILE> (&lanes)[MACHINE::kLanes]) {
  const int first_k = a.base == nullptr ? 0 : -1, streams = int(a.K) - first_k;
  const int chunks = (int(a.D) + TILE::kChunk - 1) / TILE::kChunk;
  const int shares = (chunks - warp + TILE::kWarps - 1) / TILE::kWarps * streams;
  Share here{warp * TILE::kChunk, 0, 0}, ahead = here;
  for (auto& lane : lanes) start_lane(lane, a, machine.first_lane() + int(&lane - lanes), warp, first_row, first_feature);
#pragma unroll
  for (int i = 0; i < TILE::kDepth; ++i) {
    if (i < shares)
      for (auto& lane : lanes) copy_weights(machine, lane, a, ahead, ring);
    machine.commit();
    advance<TILE>(ahead, streams);
  }
  for (auto& lane : lanes) {
    if constexpr (TILE::kReadsAhead) read_rows<TILE>(lane, a, here.d, lane.next_rows);
    find_coefficients(lane, a);
    read_coefficients(lane, first_k);
  }
#pragma unroll 1
  for (int i = 0; i < shares; ++i) {
    machine.template wait<TILE::kDepth - 1>();
    if (i + TILE::kDepth < shares)
      for (auto& lane : lanes) copy_weights(machine, lane, a, ahead, ring);
    machine.commit();
    advance<TILE>(ahead, streams);
    for (auto& lane : lanes) {
      if (here.stream == 0) take_rows(lane, a, here.d);
      read_weights(lane, ring, here.slot);
#pragma unroll
      for (int r = 0; r < TILE::kRowGroups; ++r) lane.c[r] = lane.next_c[r];
    }
    advance<TILE>(here, streams);
    for (auto& lane : lanes) read_coefficients(lane, here.stream + first_k);
#pragma unroll
    for (int step = 0; step < 2 * TILE::kVectors; ++step)
#pragma unroll
      for (int r = 0; r < TILE::kRowTiles; ++r)
#pragma unroll
        for (int f = 0; f < TILE::kTiles; ++f) machine.multiply(lanes, r, f, step / 2, step % 2);
    for (auto& lane : lanes) mix_stream(lane);
  }
  machine.template wait<0>();
}

// A warp's totals [kRows, kFeatures], in the place of its ring.
template <typename T, class TILE>
CLP_HOST_DEVICE void store_totals(const Lane<T, TILE>& lane, Words* ring) {
  float* out = reinterpret_cast<float*>(ring) + lane.index / 4 * TILE::kFeatures + lane.index % 4 * 2;
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (2 * i + j / 2 < TILE::kRowGroups)
          out[(16 * i + j / 2 * 8) * TILE::kFeatures + 8 * f + j % 2] = lane.totals[i][f][j];
}

// Adds the warps' totals of the results that one thread of a block has, and stores those inside y.
template <typename T, class TILE>
CLP_HOST_DEVICE void store_results(const DecodeArguments<T, T>& a, int thread, int first_row, int first_feature,
                                   const Words* rings) {
  for (int i = thread; i < TILE::kRows * TILE::kFeatures; i += TILE::kWarps * kLanes) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < TILE::kWarps; ++warp)
      sum += reinterpret_cast<const float*>(rings + warp * TILE::kRing)[i];
    store_result(a, first_row + i / TILE::kFeatures, first_feature + i % TILE::kFeatures, sum);
  }
}

#ifdef __CUDACC__
// One thread of a warp on a GPU.
template <typename T>
struct DeviceWarp {
  static constexpr int kLanes = 1;
  uint64_t policy;

  // Weights are read once per call: evict-first keeps x and the coefficients in L2.
  __device__ __forceinline__ DeviceWarp() {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  __device__ __forceinline__ int first_lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ void copy(Words* slot, const T* source) const {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(slot))),
                 "l"(source), "l"(policy)
                 : "memory");
  }
  __device__ __forceinline__ void copy_or_clear(Words* slot, const T* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(slot))),
                 "l"(source), "r"(inside ? 16 : 0), "l"(policy)
                 : "memory");
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int PENDING>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }
  template <class TILE>
  __device__ __forceinline__ void multiply(Lane<T, TILE> (&lanes)[1], int i, int f, int v, int half) const {
    uint32_t left[4], right[2];
    left_operand(lanes[0], i, v, half, left);
    right_operand(lanes[0], f, v, half, right);
    float(&sum)[4] = lanes[0].sums[i][f];
    if constexpr (std::is_same_v<T, __half>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    }
  }
};

// Grid: (blocks of kRows rows, blocks of kFeatures features), so that the row blocks of one feature run side by side and
// share its weights in L2. kSharedBytes of dynamic shared memory.
template <typename T, class TILE>
__global__ void __launch_bounds__(32 * TILE::kWarps, TILE::kBlocks)
    mixed_linear_decode_mma(const DecodeArguments<T, T> a) {
  extern __shared__ Words rings[];
  const int warp = threadIdx.x / 32, first_row = blockIdx.x * TILE::kRows;
  const int first_feature = find_first_feature<TILE>(a, blockIdx.y);
  Words* ring = rings + warp * TILE::kRing;
  DeviceWarp<T> machine;
  Lane<T, TILE> lanes[1];
  run_warp(machine, a, warp, first_row, first_feature, ring, lanes);
  __syncwarp();  // the ring is now everyone's
  store_totals(lanes[0], ring);
  __syncthreads();
  store_results<T, TILE>(a, threadIdx.x, first_row, first_feature, rings);
}
#endif

}  // namespace clp
