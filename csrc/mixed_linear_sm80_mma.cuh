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
// DEPTH shares of a chunk in flight a warp. CLUSTER blocks of WARPS warps each have a part of D (1 before sm_90). BLOCKS:
// blocks on a multiprocessor that the registers shall allow.
template <int ROWS, int TILES, int DEPTH, int WARPS, int CHUNK, int BLOCKS, int CLUSTER = 1>
struct MmaTile {
  static constexpr int kRows = ROWS, kTiles = TILES, kDepth = DEPTH, kChunk = CHUNK, kBlocks = BLOCKS;
  static constexpr int kWarps = WARPS, kCluster = CLUSTER, kAllWarps = WARPS * CLUSTER;
  static constexpr int kFeatures = 8 * TILES;
  static constexpr int kStride = kAllWarps * CHUNK;  // from a warp's chunk to its next
  static constexpr int kRowGroups = ROWS / 8;
  static constexpr int kRowTiles = (kRowGroups + 1) / 2;
  static constexpr int kVectors = CHUNK / 32;          // of 16 bytes: a lane's part of a chunk of one row or feature
  static constexpr int kSlot = TILES * kVectors * 32;  // of 16 bytes: a warp's share of one stream in a chunk
  // One more than are in flight: the slot that a copy fills is not the one that is being read.
  static constexpr int kRing = (DEPTH + 1) * kSlot;
  // A few rows of x come through a ring of their own, as far ahead as the weights: a load into registers would wait behind
  // every copy in flight, once a chunk. Many rows would leave the weights no room; they are read into registers, the next
  // chunk's ahead if those suffice.
  static constexpr bool kRowsInRing = ROWS <= 16, kReadsAhead = ROWS == 32;
  static constexpr int kRowSlot = kRowsInRing ? kRowGroups * kVectors * 32 : 0;
  static_assert(ROWS == 8 || ROWS % 16 == 0, "whole left operands, or half of one");
  static_assert(CHUNK % 32 == 0, "16 bytes a lane");
  static_assert(ROWS * kFeatures * 4 <= kRing * 16, "a warp's totals take the place of its ring");

  // Chunks of x in flight beside kDepth shares of `streams` streams each.
  CLP_HOST_DEVICE static int row_slots(int streams) { return DEPTH / streams + 1; }
  // A warp's part of shared memory, of 16 bytes each.
  CLP_HOST_DEVICE static int warp_words(int streams) { return kRing + row_slots(streams) * kRowSlot; }
  CLP_HOST_DEVICE static int shared_bytes(int streams) { return WARPS * warp_words(streams) * 16; }
};

// The launcher's choices. The warps of a cluster and the chunk are part of every result's bits, and so the same in all.
using MmaFew = MmaTile<8, 1, 4, 8, 128, 2>;
using MmaSome = MmaTile<16, 1, 3, 8, 128, 1>;
using MmaSomeWide = MmaTile<16, 2, 3, 8, 128, 1>;
using MmaMore = MmaTile<32, 2, 3, 8, 128, 1>;
using MmaMany = MmaTile<64, 2, 3, 8, 128, 1>;
// In the place of each on devices whose blocks have too little shared memory for it.
using MmaShallow = MmaTile<8, 1, 2, 8, 128, 2>;

using Words = Vector<uint32_t>;  // 8 elements of 16 bits

// A share in a warp's sequence: its first element of D, its stream (the base first, if there is one), its offsets in bytes
// in the rings of the weights and of x.
struct Share {
  int d, stream, slot, row_slot;
};

// A warp's sequence of shares, chunk by chunk and in each stream by stream; first_k: -1 where stream 0 is the base.
struct Walk {
  int shares, streams, first_k, last_row_slot;
};

template <class TILE, typename T>
CLP_HOST_DEVICE Walk plan_walk(const DecodeArguments<T, T>& a, int warp) {
  const int first_k = a.base == nullptr ? 0 : -1, streams = int(a.K) - first_k;
  const int chunks = (int(a.D) + TILE::kChunk - 1) / TILE::kChunk;
  return {(chunks - warp + TILE::kAllWarps - 1) / TILE::kAllWarps * streams, streams, first_k,
          (TILE::row_slots(streams) - 1) * TILE::kRowSlot * 16};
}

template <class TILE>
CLP_HOST_DEVICE void advance(Share& share, const Walk& walk) {
  share.slot = share.slot == TILE::kDepth * TILE::kSlot * 16 ? 0 : share.slot + TILE::kSlot * 16;
  if (++share.stream == walk.streams) {
    share.stream = 0;
    share.d += TILE::kStride;
    share.row_slot = share.row_slot == walk.last_row_slot ? 0 : share.row_slot + TILE::kRowSlot * 16;
  }
}

template <typename T, class TILE>
struct Lane {
  int index;                                    // in the warp
  int first;                                    // of the 32 elements of two steps: this lane's
  int row;                                      // of x: the first of those that this lane supplies
  const T* x[TILE::kRowGroups];                 // at this lane's first element of its rows
  const T* source;                              // at what it copies next of its first feature
  int64_t first_step, next_step, last_step;     // from stream 0 to 1, from one to the next, from the last to the next chunk
  int64_t base_stride, deltas_stride;           // from a feature to that 8 further on
  int weighting[TILE::kRowGroups];              // of its rows
  const float* coefficients[TILE::kRowGroups];
  float c[TILE::kRowGroups], next_c[TILE::kRowGroups];  // of the stream at hand, of the next
  uint32_t left[TILE::kRowTiles][TILE::kVectors][2][4];  // the chunk of x as left operands
  Words next_rows[TILE::kReadsAhead ? TILE::kRowGroups : 1][TILE::kVectors];
  Words weights[TILE::kTiles][TILE::kVectors];
  float sums[TILE::kRowTiles][TILE::kTiles][4];    // of the stream's share of a chunk
  float totals[TILE::kRowTiles][TILE::kTiles][4];  // rows g, g, g + 8, g + 8; features 2t, 2t + 1, 2t, 2t + 1
};

// The row of group i, or the last one in the place of rows past the end, whose results are dropped.
template <typename T, class TILE>
CLP_HOST_DEVICE int find_row(const Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int i) {
  const int row = lane.row + 8 * i, last = int(a.M) - 1;
  return row < last ? row : last;
}

template <typename T, class TILE>
CLP_HOST_DEVICE void start_lane(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int index, int warp, int first_row,
                                int first_feature) {
  const int64_t feature = first_feature + index / 4, D = a.D, K = a.K;
  lane.index = index;
  lane.first = index % 4 * 8;
  lane.row = first_row + index / 4;
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) {
    const int row = find_row(lane, a, i);
    lane.x[i] = a.x + (row * D + lane.first);
    lane.weighting[i] = a.row_map[row];
  }
  const T* deltas = a.deltas + feature * K * D;
  const T* base = a.base == nullptr ? deltas : a.base + feature * D;
  lane.source = base + (lane.first + warp * TILE::kChunk);
  // A chunk's step from its base to its deltas is one number for all chunks, whatever the two tensors' addresses.
  const int64_t to_deltas = (reinterpret_cast<intptr_t>(deltas) - reinterpret_cast<intptr_t>(base)) / int(sizeof(T));
  lane.next_step = D;
  lane.first_step = a.base == nullptr ? D : to_deltas;
  lane.last_step = TILE::kStride - (K - 1) * D - to_deltas;
  lane.deltas_stride = 8 * K * D;
  lane.base_stride = a.base == nullptr ? lane.deltas_stride : 8 * D;
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.totals[i][f][j] = 0.0f;
}

template <typename T, class TILE>
CLP_HOST_DEVICE void find_coefficients(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) lane.coefficients[i] = a.coefficients + lane.weighting[i] * a.K;
}

template <typename T, class TILE>
CLP_HOST_DEVICE void read_coefficients(Lane<T, TILE>& lane, int k) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) lane.next_c[i] = k < 0 ? 1.0f : lane.coefficients[i][k];
}

// Starts the copies of one share, and of the chunk of x before its first; moves the lane's source to the next share. Zeros
// past the end of D.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void start_copies(MACHINE& machine, Lane<T, TILE>& lane, const DecodeArguments<T, T>& a,
                                  const Walk& walk, const Share& share) {
  const int D = int(a.D), d = share.d + lane.first;
  if (TILE::kRowsInRing && share.stream == 0)
#pragma unroll
    for (int i = 0; i < TILE::kRowGroups; ++i) {
      const T* source = lane.x[i] + share.d;
#pragma unroll
      for (int v = 0; v < TILE::kVectors; ++v)
        machine.copy_row(lane.index, 16 * (TILE::kRing + (i * TILE::kVectors + v) * 32) + share.row_slot, source + 32 * v,
                         d + 32 * v < D);
    }
  const int64_t stride = share.stream == 0 ? lane.base_stride : lane.deltas_stride;
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f) {
    const T* source = lane.source + f * stride;
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v)
      machine.copy(lane.index, 16 * (f * TILE::kVectors + v) * 32 + share.slot, source + 32 * v, d + 32 * v < D);
  }
  lane.source += share.stream == walk.streams - 1 ? lane.last_step : share.stream == 0 ? lane.first_step : lane.next_step;
}

// Not through the read-only cache: with an early launch, x may be written while this kernel already waits.
template <class TILE, typename T>
CLP_HOST_DEVICE void read_rows(const Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int d, int i,
                               Words (&row)[TILE::kVectors]) {
  const T* source = lane.x[i] + d;
#pragma unroll
  for (int v = 0; v < TILE::kVectors; ++v) {
    row[v] = Words{};
    if (d + 32 * v + lane.first < int(a.D)) row[v] = *reinterpret_cast<const Words*>(source + 32 * v);
  }
}

template <class TILE, typename T>
CLP_HOST_DEVICE void read_rows_ahead(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int d) {
  if constexpr (TILE::kReadsAhead)
#pragma unroll
    for (int i = 0; i < TILE::kRowGroups; ++i) read_rows(lane, a, d, i, lane.next_rows[i]);
}

// Makes the share's chunk of x the one at hand: for each step of the two in a vector, pairs t and t + 4 of rows g and
// g + 8.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void take_rows(const MACHINE& machine, Lane<T, TILE>& lane, const DecodeArguments<T, T>& a,
                               const Share& share) {
#pragma unroll
  for (int i = 0; i < 2 * TILE::kRowTiles; ++i) {
    Words row[TILE::kVectors] = {};
    if (i < TILE::kRowGroups) {
      if constexpr (TILE::kRowsInRing) {
#pragma unroll
        for (int v = 0; v < TILE::kVectors; ++v)
          row[v] = machine.read(lane.index, 16 * (TILE::kRing + (i * TILE::kVectors + v) * 32) + share.row_slot);
      } else if constexpr (TILE::kReadsAhead) {
#pragma unroll
        for (int v = 0; v < TILE::kVectors; ++v) row[v] = lane.next_rows[i][v];
      } else {
        read_rows(lane, a, share.d, i, row);
      }
    }
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.left[i / 2][v][j / 2][i % 2 + j % 2 * 2] = row[v].element[j];
  }
  read_rows_ahead(lane, a, share.d + TILE::kStride);
}

template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void read_weights(const MACHINE& machine, Lane<T, TILE>& lane, int slot) {
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f) {
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v)
      lane.weights[f][v] = machine.read(lane.index, 16 * (f * TILE::kVectors + v) * 32 + slot);
#pragma unroll
    for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.sums[i][f][j] = 0.0f;
  }
}

// A lane's registers of step `half` of the two in a vector: pairs t and t + 4 of feature g.
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

// One warp's share of y without the bias, into its lanes' totals. warp: in the cluster.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void run_warp(MACHINE& machine, const DecodeArguments<T, T>& a, int warp, int first_row,
                              int first_feature, Lane<T, TILE> (&lanes)[MACHINE::kLanes]) {
  const Walk walk = plan_walk<TILE>(a, warp);
  Share here{warp * TILE::kChunk, 0, 0, 0}, ahead = here;
  for (auto& lane : lanes) {
    start_lane(lane, a, machine.first_lane() + int(&lane - lanes), warp, first_row, first_feature);
    read_rows_ahead(lane, a, here.d);
  }
  // A loop, not a list of copies: instructions that a block runs once are misses of their cache.
#pragma unroll 1
  for (int i = 0; i < TILE::kDepth; ++i) {
    if (i < walk.shares)
      for (auto& lane : lanes) start_copies(machine, lane, a, walk, ahead);
    machine.commit();
    advance<TILE>(ahead, walk);
    // The coefficients' loads depend on those of row_map: some copies run beside these, and not all go before them.
    if (i == (TILE::kDepth > 1))
      for (auto& lane : lanes) {
        find_coefficients(lane, a);
        read_coefficients(lane, walk.first_k);
      }
  }
#pragma unroll 1
  for (int i = 0; i < walk.shares; ++i) {
    machine.template wait<TILE::kDepth - 1>();
    if (i + TILE::kDepth < walk.shares)
      for (auto& lane : lanes) start_copies(machine, lane, a, walk, ahead);
    machine.commit();
    advance<TILE>(ahead, walk);
    for (auto& lane : lanes) {
      if (here.stream == 0) take_rows(machine, lane, a, here);
      read_weights(machine, lane, here.slot);
#pragma unroll
      for (int r = 0; r < TILE::kRowGroups; ++r) lane.c[r] = lane.next_c[r];
    }
    advance<TILE>(here, walk);
    for (auto& lane : lanes) read_coefficients(lane, here.stream + walk.first_k);
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

// Adds the warps' totals of every `threads`-th result from `thread` on, and stores those inside y. total(warp, i): of one
// result i of the block's.
template <class TILE, typename T, class TOTAL>
CLP_HOST_DEVICE void store_results(const DecodeArguments<T, T>& a, int thread, int threads, int first_row,
                                   int first_feature, const TOTAL& total) {
  for (int i = thread; i < TILE::kRows * TILE::kFeatures; i += threads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < TILE::kAllWarps; ++warp) sum += total(warp, i);
    store_result(a, first_row + i / TILE::kFeatures, first_feature + i % TILE::kFeatures, sum);
  }
}

#ifdef __CUDACC__
// One thread of a warp on a GPU.
template <typename T>
struct DeviceWarp {
  static constexpr int kLanes = 1;
  uint64_t policy;
  uint32_t ring;  // this lane's first 16 bytes of it

  // Weights are read once per call: evict-first keeps x and the coefficients in L2.
  __device__ __forceinline__ explicit DeviceWarp(const Words* warp_ring)
      : ring(static_cast<uint32_t>(__cvta_generic_to_shared(warp_ring)) + threadIdx.x % 32 * 16) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("" : "+r"(ring));  // computed once, not in every step of the loop
  }
  __device__ __forceinline__ int first_lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ void copy(int, int offset, const T* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(ring + offset),
                 "l"(source), "r"(inside ? 16 : 0), "l"(policy)
                 : "memory");
  }
  // Every block reads x: no hint.
  __device__ __forceinline__ void copy_row(int, int offset, const T* source, bool inside) const {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(ring + offset), "l"(source),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ Words read(int, int offset) const {
    Words words;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words.element[0]), "=r"(words.element[1]), "=r"(words.element[2]), "=r"(words.element[3])
                 : "r"(ring + offset)
                 : "memory");
    return words;
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int PENDING>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  }
  template <class TILE>
  __device__ __forceinline__ void multiply(Lane<T, TILE> (&lanes)[1], int i, int f, int v, int half) const {
    const uint32_t(&left)[4] = lanes[0].left[i][v][half];
    uint32_t right[2];
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

__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ float read_in_cluster(const float* shared, int block) {
  float value;
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}"
               : "=f"(value)
               : "r"(address), "r"(block)
               : "memory");
  return value;
}

// Grid: (kCluster parts of D of each block of kRows rows, blocks of kFeatures features), so that the row blocks of one
// feature run side by side and share its weights in L2. shared_bytes() of dynamic shared memory.
template <typename T, class TILE>
__global__ void __launch_bounds__(32 * TILE::kWarps, TILE::kBlocks)
    mixed_linear_decode_mma(const DecodeArguments<T, T> a) {
  extern __shared__ Words rings[];
  const int part = blockIdx.x % TILE::kCluster, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x / TILE::kCluster * TILE::kRows;
  const int first_feature = find_first_feature<TILE>(a, blockIdx.y);
  const int words = TILE::warp_words(int(a.K) + (a.base != nullptr));
  DeviceWarp<T> machine(rings + warp * words);
  Lane<T, TILE> lanes[1];
#if __CUDA_ARCH__ >= 900
  // Launched while the kernel before it still runs, of which it may read the results: nothing is read before this.
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  run_warp(machine, a, part * TILE::kWarps + warp, first_row, first_feature, lanes);
  __syncwarp();  // the ring is now everyone's
  store_totals(lanes[0], rings + warp * words);
  const float* totals = reinterpret_cast<const float*>(rings);
  if constexpr (TILE::kCluster == 1) {
    __syncthreads();
    store_results<TILE>(a, threadIdx.x, 32 * TILE::kWarps, first_row, first_feature,
                        [&](int w, int i) { return totals[w * words * 4 + i]; });
  } else {
#if __CUDA_ARCH__ >= 900
    wait_for_cluster();
    store_results<TILE>(
        a, part * 32 * TILE::kWarps + threadIdx.x, 32 * TILE::kAllWarps, first_row, first_feature,
        [&](int w, int i) { return read_in_cluster(totals + w % TILE::kWarps * words * 4 + i, w / TILE::kWarps); });
    wait_for_cluster();  // no block's shared memory goes before the others have read it
#endif
  }
}
#endif

}  // namespace clp
