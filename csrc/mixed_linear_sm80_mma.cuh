// Tensor-core form of the CUDA decode kernel of mixed_linear: 16-bit rows and weights of one dtype, D a multiple of 8.
// The operator, its arguments and the legend are in mixed_linear_sm80.cuh.
//
// The kernel's job is to read (K + 1) N D weights once at the memory's speed; a few rows cost next to nothing beside it.
//
// - A block owns a few features and all rows. D falls into kParts parts (part p: chunks p, p + kParts, ...), of which a
//   warp has one or, where a tile is large and its warps few, several in turn. Within a chunk it takes the base and then
//   the copies, so that a chunk of x is read once for all K + 1 streams.
// - mma.m16n8k16 adds in float32; x^T is its left operand (16 rows), the weights the right one (8 features). After the
//   share of a stream in a chunk, total += c[m, k] * sum: the mix of weights is never formed and never rounded.
// - The reduced index may be permuted as long as both operands agree. A lane supplies row or feature g = lane / 4 and the
//   pairs t = lane % 4 and t + 4 of a step of 16; it takes them from one 16-byte load, elements 8t .. 8t + 7 of the 32 of
//   two steps. So no lane ever needs another's weights: what a lane copies into shared memory it reads back itself, and
//   the copies in flight (kDepth of them, cp.async) need no barrier and no registers.
// - The parts' totals meet in shared memory and are added in the parts' order.
//
// Order and grouping of every sum depend on D and K alone. A row's bits are the same for every M, position in the batch
// and neighbour, and for every tile below: kParts and kChunk, which would change them, are the same in all.
//
// run_warp is written for a machine of kLanes lanes: one on a GPU, where every thread runs it, and 32 in the tests, which
// run a whole warp on the host and check what is read against what has been copied by then.
#pragma once

#include "mixed_linear_sm80.cuh"

namespace clp {

// ROWS rows (8, or a multiple of 16) and TILES groups of 8 features a block, CHUNK elements of D a warp takes at a time,
// DEPTH shares of a chunk in flight a warp. RUNS parts of D a warp takes in turn. CLUSTER blocks, each with WARPS parts (1
// before sm_90). MEMBERS: in the place of each warp so many, which share its weights and divide its rows. BLOCKS: blocks
// on a multiprocessor that the registers shall allow.
template <int ROWS, int TILES, int DEPTH, int WARPS, int CHUNK, int BLOCKS, int RUNS = 1,
          int CLUSTER = 1, int MEMBERS = 1>
struct MmaTile {
  static constexpr int kRows = ROWS, kTiles = TILES, kDepth = DEPTH, kChunk = CHUNK, kBlocks = BLOCKS;
  static constexpr int kWarps = WARPS, kRuns = RUNS, kCluster = CLUSTER;
  static constexpr int kMembers = MEMBERS, kThreads = 32 * WARPS * MEMBERS;
  static constexpr int kParts = WARPS * RUNS * CLUSTER;  // of D, each with a total of its own
  static constexpr int kFeatures = 8 * TILES, kResults = ROWS * kFeatures;
  static constexpr int kStride = kParts * CHUNK;  // from a part's chunk to its next
  static constexpr int kRunStride = WARPS * CLUSTER * CHUNK;  // from a warp's part to its next
  static constexpr int kMemberRows = ROWS / MEMBERS, kRowGroups = kMemberRows / 8;
  static constexpr int kRowTiles = (kRowGroups + 1) / 2;
  static constexpr int kVectors = CHUNK / 32;          // of 16 bytes: a lane's part of a chunk of one row or feature
  static constexpr int kSlot = TILES * kVectors * 32;  // of 16 bytes: a warp's share of one stream in a chunk
  // One more than are in flight: the slot that a copy fills is not the one that is being read.
  static constexpr int kRing = (DEPTH + 1) * kSlot;
  // A few rows of x come through a ring of their own, as far ahead as the weights: a load into registers would wait behind
  // every copy in flight, once a chunk. Many rows would leave the weights no room; they are read into registers, the next
  // chunk's ahead if those suffice.
  static constexpr bool kRowsInRing = kMemberRows <= 16 || WARPS == 4, kReadsAhead = ROWS == 32 && !kRowsInRing;
  static constexpr int kRowSlot = kRowsInRing ? kRowGroups * kVectors * 32 : 0;
  static_assert(ROWS == 8 || ROWS % 16 == 0, "whole left operands, or half of one");
  static_assert(CHUNK % 32 == 0, "16 bytes a lane");
  static_assert(RUNS > 1 || kResults * 4 <= kRing * 16, "a warp's totals take the place of its ring");
  static_assert(RUNS > 1 || MEMBERS == 1, "a ring that two warps share is not free when one of them has read it");
  static_assert(RUNS == 1 || CLUSTER == 1, "totals behind the rings are read by their own block");

  // Chunks of x in flight beside kDepth shares of `streams` streams each.
  CLP_HOST_DEVICE static int row_slots(int streams) { return DEPTH / streams + 1; }
  // A warp's part of shared memory, of 16 bytes each.
  CLP_HOST_DEVICE static int warp_words(int streams) { return kRing + MEMBERS * row_slots(streams) * kRowSlot; }
  CLP_HOST_DEVICE static int shared_bytes(int streams) {
    return WARPS * warp_words(streams) * 16 + (RUNS > 1 ? kParts * kResults * 4 : 0);
  }
  // Where the total of a part of D is, in floats from the block's shared memory.
  CLP_HOST_DEVICE static int find_total(int part, int streams) {
    const int words = warp_words(streams) * 4;
    return RUNS > 1 ? WARPS * words + part * kResults : part % WARPS * words;
  }
};

// The launcher's choices for 8, 16, 32 and 64 rows; wide ones read x half as often, from L2, and have half the blocks.
using MmaFew = MmaTile<8, 1, 4, 8, 128, 2>;
using MmaSome = MmaTile<16, 1, 3, 8, 128, 1>;
using MmaSomeWide = MmaTile<16, 2, 3, 4, 128, 2, 2>;
using MmaMore = MmaTile<32, 2, 3, 8, 128, 1>;
using MmaMoreWide = MmaTile<32, 4, 3, 4, 128, 1, 2>;
using MmaMany = MmaTile<64, 2, 3, 4, 128, 1, 2, 1, 2>;
using MmaManyWide = MmaTile<64, 4, 2, 4, 128, 1, 2, 1, 2>;
// Where a block's shared memory is too little for these.
using MmaManySmall = MmaTile<64, 2, 3, 8, 128, 1>;
using MmaFewSmall = MmaTile<8, 1, 2, 8, 128, 2>;

using Words = Vector<uint32_t>;  // 8 elements of 16 bits

// A share in a warp's sequence: its first element of D, its stream (the base first, if there is one), its offsets in bytes
// in the rings of the weights and of x.
struct Share {
  int d, stream, slot, row_slot;
};

// A warp's sequence of shares, chunk by chunk and in each stream by stream; first_k: -1 where stream 0 is the base.
struct Walk {
  int shares, streams, first_k, last_row_slot, D;
};

template <class TILE, typename T>
CLP_HOST_DEVICE Walk plan_walk(const DecodeArguments<T, T>& a, int warp) {
  const int first_k = a.base == nullptr ? 0 : -1, streams = int(a.K) - first_k, D = int(a.D);
  int chunks = 0;
#pragma unroll
  for (int run = 0; run < TILE::kRuns; ++run)
    chunks += ((D + TILE::kChunk - 1) / TILE::kChunk - warp - run * TILE::kWarps + TILE::kParts - 1) / TILE::kParts;
  return {chunks * streams, streams, first_k, (TILE::row_slots(streams) - 1) * TILE::kRowSlot * 16, D};
}

// The chunk after the one at d: the next of the same part of D, or the first of the warp's next part.
template <class TILE>
CLP_HOST_DEVICE int find_next_chunk(const Walk& walk, int d) {
  const int next = d + TILE::kStride;
  if (TILE::kRuns == 1 || next < walk.D) return next;
  return d % TILE::kStride + TILE::kRunStride;
}

template <class TILE>
CLP_HOST_DEVICE void advance(Share& share, const Walk& walk) {
  share.slot = share.slot == TILE::kDepth * TILE::kSlot * 16 ? 0 : share.slot + TILE::kSlot * 16;
  if (++share.stream == walk.streams) {
    share.stream = 0;
    share.d = find_next_chunk<TILE>(walk, share.d);
    share.row_slot = share.row_slot == walk.last_row_slot ? 0 : share.row_slot + TILE::kRowSlot * 16;
  }
}

template <typename T, class TILE>
struct Lane {
  int index;                                    // in its warp
  int member;                                   // of the warps that share their weights: which
  int row_ring;                                 // where its warp's ring of x starts, in bytes
  int first;                                    // of the 32 elements of two steps: this lane's
  int row;                                      // of x: the first of those that this lane supplies
  const T* x;                                   // at this lane's first element of its first row
  int row_offsets[TILE::kRowGroups];            // from there to its others
  const T* source;                              // at what it copies next of its first feature
  int64_t first_step, next_step, last_step;     // from stream 0 to 1, one to the next, the last to 0
  int64_t base_stride, deltas_stride;           // from a feature to that 8 further on
  int coefficients[TILE::kRowGroups];           // of its rows: where they start
  float c[TILE::kRowGroups], next_c[TILE::kRowGroups];  // of the stream at hand, of the next
  uint32_t left[TILE::kRowTiles][TILE::kVectors][2][4];  // the chunk of x as left operands
  Words next_rows[TILE::kReadsAhead ? TILE::kRowGroups : 1][TILE::kVectors];
  Words weights[TILE::kTiles];                           // of one vector
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
  const int64_t feature = first_feature + index % 32 / 4, D = a.D, K = a.K;
  lane.index = index % 32;
  lane.member = index / 32;
  lane.row_ring = 16 * (TILE::kRing + lane.member * TILE::row_slots(int(a.K) + (a.base != nullptr)) * TILE::kRowSlot);
  lane.first = index % 4 * 8;
  lane.row = first_row + lane.member * TILE::kMemberRows + lane.index / 4;
  const int first = find_row(lane, a, 0);
  lane.x = a.x + (first * D + lane.first);
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) {
    const int row = find_row(lane, a, i);
    lane.row_offsets[i] = (row - first) * int(D);
    lane.coefficients[i] = a.row_map[row];
  }
  const T* deltas = a.deltas + feature * K * D;
  const T* base = a.base == nullptr ? deltas : a.base + feature * D;
  lane.source = base + (lane.first + warp * TILE::kChunk);
  // A chunk's step from its base to its deltas is one number for all chunks, whatever the two tensors' addresses.
  const int64_t to_deltas = (reinterpret_cast<intptr_t>(deltas) - reinterpret_cast<intptr_t>(base)) / int(sizeof(T));
  lane.next_step = D;
  lane.first_step = a.base == nullptr ? D : to_deltas;
  lane.last_step = -(K - 1) * D - to_deltas;
  lane.deltas_stride = 8 * K * D;
  lane.base_stride = a.base == nullptr ? lane.deltas_stride : 8 * D;
}

// From what row_map holds to where a row's coefficients start. Waits for those loads, and not earlier: hence the barrier
// to the compiler, which would move the product before the copies.
template <typename T, class TILE>
CLP_HOST_DEVICE void find_coefficients(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(lane.coefficients[i]));
#endif
    lane.coefficients[i] *= int(a.K);
  }
}

template <typename T, class TILE>
CLP_HOST_DEVICE void read_coefficients(Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int k) {
#pragma unroll
  for (int i = 0; i < TILE::kRowGroups; ++i) lane.next_c[i] = k < 0 ? 1.0f : a.coefficients[lane.coefficients[i] + k];
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
      const T* source = lane.x + (lane.row_offsets[i] + share.d);
#pragma unroll
      for (int v = 0; v < TILE::kVectors; ++v)
        machine.copy_row(lane.index, lane.row_ring + 16 * (i * TILE::kVectors + v) * 32 + share.row_slot, source + 32 * v,
                         d + 32 * v < D);
    }
  const int64_t stride = share.stream == 0 ? lane.base_stride : lane.deltas_stride;
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f) {
    const T* source = lane.source + f * stride;
#pragma unroll
    for (int u = 0; u < TILE::kVectors; u += TILE::kMembers) {
      const int v = u + lane.member;  // of the vectors, each member brings its share
      machine.copy(lane.index, 16 * (f * TILE::kVectors + v) * 32 + share.slot, source + 32 * v, d + 32 * v < D);
    }
  }
  if (share.stream == walk.streams - 1)
    lane.source += lane.last_step + (find_next_chunk<TILE>(walk, share.d) - share.d);
  else
    lane.source += share.stream == 0 ? lane.first_step : lane.next_step;
}

// Not through the read-only cache: with an early launch, x may be written while this kernel already waits.
template <class TILE, typename T>
CLP_HOST_DEVICE void read_rows(const Lane<T, TILE>& lane, const DecodeArguments<T, T>& a, int d, int i,
                               Words (&row)[TILE::kVectors]) {
  const T* source = lane.x + (lane.row_offsets[i] + d);
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
          row[v] = machine.read(lane.index, lane.row_ring + 16 * (i * TILE::kVectors + v) * 32 + share.row_slot);
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

template <typename T, class TILE>
CLP_HOST_DEVICE void clear_sums(Lane<T, TILE>& lane) {
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.sums[i][f][j] = 0.0f;
}

template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void read_weights(const MACHINE& machine, Lane<T, TILE>& lane, int slot, int v) {
#pragma unroll
  for (int f = 0; f < TILE::kTiles; ++f)
    lane.weights[f] = machine.read(lane.index, 16 * (f * TILE::kVectors + v) * 32 + slot);
}

// A lane's registers of step `half` of the two in a vector: pairs t and t + 4 of feature g.
template <typename T, class TILE>
CLP_HOST_DEVICE void right_operand(const Lane<T, TILE>& lane, int f, int half, uint32_t (&words)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) words[j] = lane.weights[f].element[2 * half + j];
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

// A part's totals [kRows, kFeatures].
template <typename T, class TILE>
CLP_HOST_DEVICE void store_totals(const Lane<T, TILE>& lane, float* totals) {
  float* out = totals + (lane.member * TILE::kMemberRows + lane.index / 4) * TILE::kFeatures + lane.index % 4 * 2;
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (2 * i + j / 2 < TILE::kRowGroups)
          out[(16 * i + j / 2 * 8) * TILE::kFeatures + 8 * f + j % 2] = lane.totals[i][f][j];
}

template <typename T, class TILE>
CLP_HOST_DEVICE void clear_totals(Lane<T, TILE>& lane) {
#pragma unroll
  for (int i = 0; i < TILE::kRowTiles; ++i)
#pragma unroll
    for (int f = 0; f < TILE::kTiles; ++f)
#pragma unroll
      for (int j = 0; j < 4; ++j) lane.totals[i][f][j] = 0.0f;
}

// One warp's parts of y without the bias, into shared memory. warp: in the cluster.
template <typename T, class TILE, class MACHINE>
CLP_HOST_DEVICE void run_warp(MACHINE& machine, const DecodeArguments<T, T>& a, int warp, int first_row,
                              int first_feature, float* shared, Lane<T, TILE> (&lanes)[MACHINE::kLanes]) {
  const Walk walk = plan_walk<TILE>(a, warp);
  Share here{warp * TILE::kChunk, 0, 0, 0}, ahead = here;
  for (auto& lane : lanes) {
    start_lane(lane, a, machine.first_lane() + int(&lane - lanes), warp, first_row, first_feature);
    clear_totals(lane);
    if constexpr (TILE::kRuns > 1)  // parts without a chunk stay so
      for (int run = 0; run < TILE::kRuns; ++run)
        store_totals(lane, shared + TILE::find_total(warp + run * TILE::kWarps, walk.streams));
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
        read_coefficients(lane, a, walk.first_k);
      }
  }
#pragma unroll 1
  for (int i = 0; i < walk.shares; ++i) {
    machine.template wait<TILE::kDepth - 1>();
    machine.template meet<TILE>();
    if (i + TILE::kDepth < walk.shares)
      for (auto& lane : lanes) start_copies(machine, lane, a, walk, ahead);
    machine.commit();
    advance<TILE>(ahead, walk);
    for (auto& lane : lanes) {
      if (here.stream == 0) take_rows(machine, lane, a, here);
      clear_sums(lane);
#pragma unroll
      for (int r = 0; r < TILE::kRowGroups; ++r) lane.c[r] = lane.next_c[r];
    }
    const int d = here.d, slot = here.slot;
    advance<TILE>(here, walk);
    for (auto& lane : lanes) read_coefficients(lane, a, here.stream + walk.first_k);
#pragma unroll
    for (int v = 0; v < TILE::kVectors; ++v) {
      for (auto& lane : lanes) read_weights(machine, lane, slot, v);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int r = 0; r < TILE::kRowTiles; ++r)
#pragma unroll
          for (int f = 0; f < TILE::kTiles; ++f) machine.multiply(lanes, r, f, v, half);
    }
    for (auto& lane : lanes) mix_stream(lane);
    if constexpr (TILE::kRuns > 1)
      if ((here.d != d && here.d != d + TILE::kStride) || i + 1 == walk.shares)
        for (auto& lane : lanes) {
          store_totals(lane, shared + TILE::find_total(d / TILE::kChunk % TILE::kParts, walk.streams));
          clear_totals(lane);
        }
  }
  machine.template wait<0>();
  if constexpr (TILE::kRuns == 1) {
    machine.join();  // the ring is the totals' place now
    for (auto& lane : lanes) store_totals(lane, shared + TILE::find_total(warp, walk.streams));
  }
}

// Adds the parts' totals of every `threads`-th result from `thread` on, and stores those inside y. total(part, i): of
// result i of the block's.
template <class TILE, typename T, class TOTAL>
CLP_HOST_DEVICE void store_results(const DecodeArguments<T, T>& a, int thread, int threads, int first_row,
                                   int first_feature, const TOTAL& total) {
  for (int i = thread; i < TILE::kRows * TILE::kFeatures; i += threads) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < TILE::kParts; ++part) sum += total(part, i);
    store_result(a, first_row + i / TILE::kFeatures, first_feature + i % TILE::kFeatures, sum);
  }
}

}  // namespace clp
