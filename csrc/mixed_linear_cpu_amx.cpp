// Products with bfloat16 rows by Intel AMX's tiles (AMX-TILE, AMX-BF16, with AVX-512); run only where the processor has
// them and the operating system has granted them.
//
// Weights are rows of tiles, as they lie in memory, and x their columns, packed.
#include "cpu_amx.h"

#ifdef CLP_AMX
#include <immintrin.h>

#include "mixed_linear_cpu_tiles.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define CLP_WIDTH 16
#define CLP_F16C
#define CLP_INLINE_MEMBER inline __attribute__((always_inline))

namespace clp {
namespace amx {
namespace {

constexpr int kWidth = CLP_WIDTH;

#include "mixed_linear_cpu_vector.h"

#include "mixed_linear_cpu_amx_tiles.h"

constexpr int64_t kOutputs = 2 * kTile;          // of a block

#include "mixed_linear_cpu_amx_panels.h"

// out[n, i] = or, where `add`, += <row n of the panel, row i of x>, [32, 32]; x has one tile of rows, or two that are
// x_step apart. `fetch`: as many rows, panel.ahead from here, are fetched ahead, in the order of memory.
template <bool two_outputs, bool two_rows>
static __attribute__((noinline)) void multiply(const Panel& panel, const Bf16* x, int64_t x_step, int64_t tiles,
                                               bool fetch, bool add, float* out) {
  if (add) {
    CLP_TILE_LOAD(0, out, kOutputs * 4);
    if (two_rows) CLP_TILE_LOAD(1, out + kTile, kOutputs * 4);
    if (two_outputs) CLP_TILE_LOAD(2, out + kTile * kOutputs, kOutputs * 4);
    if (two_outputs && two_rows) CLP_TILE_LOAD(3, out + kTile * kOutputs + kTile, kOutputs * 4);
  } else {
    CLP_TILE_ZERO(0);
    if (two_rows) CLP_TILE_ZERO(1);
    if (two_outputs) CLP_TILE_ZERO(2);
    if (two_outputs && two_rows) CLP_TILE_ZERO(3);
  }
  const char *low = panel.low, *high = panel.high, *next = panel.low + panel.ahead;
  int64_t left_of_row = tiles;
  for (int64_t t = 0; t < tiles; t++, low += panel.tile_step, high += panel.tile_step, x += kTileSize) {
    for (int64_t left = fetch ? kOutputs : 0; left > 0;) {
      const int64_t lines = left < left_of_row ? left : left_of_row;
      for (int64_t i = 0; i < lines; i++, next += 64) __builtin_prefetch(next, 0, 2);
      left -= lines;
      left_of_row -= lines;
      if (left_of_row == 0) {
        next += panel.row_step - tiles * panel.tile_step;
        left_of_row = tiles;
      }
    }
    CLP_TILE_LOAD(6, x, 64);
    if (two_rows) CLP_TILE_LOAD(7, x + x_step, 64);
    for (int64_t part = 0; part < panel.parts; part++) {
      CLP_TILE_LOAD(4, low + part * panel.part_step, panel.row_step);
      CLP_TILE_MULTIPLY(0, 4, 6);
      if (two_rows) CLP_TILE_MULTIPLY(1, 4, 7);
      if (two_outputs) {
        CLP_TILE_LOAD(5, high + part * panel.part_step, panel.row_step);
        CLP_TILE_MULTIPLY(2, 5, 6);
        if (two_rows) CLP_TILE_MULTIPLY(3, 5, 7);
      }
    }
  }
  CLP_TILE_STORE(0, out, kOutputs * 4);
  if (two_rows) CLP_TILE_STORE(1, out + kTile, kOutputs * 4);
  if (two_outputs) CLP_TILE_STORE(2, out + kTile * kOutputs, kOutputs * 4);
  if (two_outputs && two_rows) CLP_TILE_STORE(3, out + kTile * kOutputs + kTile, kOutputs * 4);
}

// One block of outputs: sums[n, i] over the streams, `step` apart, [kOutputs, step].
struct Block {
  int64_t n0, count;
  float *sums, *products;
  int64_t step;
  Bf16* scratch;
};

// Adds c times the stream's products with up to 32 rows of x to their sums; c per row, null: 1. `rest`: what is left of
// the rows in x, or null; it is multiplied by the first part of the weights alone.
static void add_products(const Block& block, const Panel& panel, const Bf16* x, const Bf16* rest, int64_t x_step,
                         int64_t tiles, bool two_rows, bool fetch, const float* c, float* sums) {
  const bool two_outputs = block.count > kTile;
  const auto run = two_outputs ? (two_rows ? multiply<true, true> : multiply<true, false>)
                               : (two_rows ? multiply<false, true> : multiply<false, false>);
  run(panel, x, x_step, tiles, fetch, false, block.products);
  if (rest) {
    Panel first_part = panel;
    first_part.parts = 1;
    run(first_part, rest, x_step, tiles, false, true, block.products);
  }
  for (int64_t i = 0; i < (two_rows ? 2 * kTile : kTile); i += kWidth) {
    const Vec factor = c ? load(c + i) : splat(1.0f);
    for (int64_t n = 0; n < block.count; n++) {
      float* sum = sums + n * block.step + i;
      store(sum, load(sum) + factor * load(block.products + n * kOutputs + i));
    }
  }
}

// Adds the streams' products with the packed rows to their sums; c [K, block.step] where the streams are copies.
template <typename Weight, int most_parts>
static void add_streams(const Block& block, const Streams<Weight, most_parts>& streams, const Bf16* rows,
                        int64_t num_rows, const float* c, const Bf16* rest = nullptr) {
  const int64_t tiles = tile_terms(streams.D) / kTerms, x_step = tiles * kTileSize;
  if (!streams.are_tiles()) copy_to_tiles(streams, block.scratch);
  for (int64_t m = 0; m < num_rows; m += 2 * kTile) {
    const Bf16* x = rows + m / kTile * x_step;
    for (int64_t a = 0; a < streams.num_copies; a++) {
      const float* factors = streams.copies ? c + streams.copies[a] * block.step + m : nullptr;
      const bool fetch = streams.are_tiles() && m == 0;
      const Bf16* left = rest ? rest + m / kTile * x_step : nullptr;
      add_products(block, panel_of(streams, a, block.scratch), x, left, x_step, tiles, num_rows - m > kTile, fetch,
                   factors, block.sums + m);
    }
  }
}

template <typename Weight>
CLP_INLINE void add_base(const TilesJob& job, const Block& block, const Weight* base) {
  const int64_t D = job.weights.D;
  add_streams(block, Streams<Weight>{base + block.n0 * D, D, block.count, D, nullptr, 1}, job.x, job.rows, nullptr);
}

template <typename Weight>
CLP_INLINE void add_copies(const TilesJob& job, const Block& block, const Weight* deltas) {
  const int64_t D = job.weights.D, step = job.weights.K * D, count = job.streams.count;
  for (int64_t a = 0; a < count; a += job.together) {
    const int64_t together = count - a < job.together ? count - a : job.together;
    const Weight* rows = deltas + block.n0 * step;
    const Streams<Weight> streams{rows, step, block.count, D, job.streams.copies + a, together};
    add_streams(block, streams, job.x, job.rows, job.c);
  }
}

static void start_sums(const TilesJob& job, const Block& block) {
  const int64_t K = job.weights.K;
  for (int64_t n = 0; n < block.count; n++) {
    for (int64_t i = 0; i < block.step; i += kWidth) {
      Vec sum = splat(job.bias ? job.bias[block.n0 + n] : 0.0f);
      for (int64_t k = 0; job.bias_deltas && k < K; k++) {
        sum += load(job.c + k * block.step + i) * job.bias_deltas[(block.n0 + n) * K + k];
      }
      store(block.sums + n * block.step + i, sum);
    }
  }
}

CLP_INLINE void store_row(const Vec& row, __mmask16 valid, Bf16* to) {
  const VecUint bits = round_to_bf16(row) >> 16;
  _mm512_mask_cvtepi32_storeu_epi16(to, valid, (__m512i)bits);
}

CLP_INLINE void store_row(const Vec& row, __mmask16 valid, float* to) {
  _mm512_mask_storeu_ps(to, valid, (__m512)row);
}

// The block's sums into its columns of y [num_rows, N].
template <typename Result>
static void store_outputs(const Block& block, int64_t num_rows, int64_t N, Result* y) {
  for (int64_t m = 0; m < num_rows; m += kTile) {
    for (int64_t n = 0; n < block.count; n += kTile) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTile; j++) rows[j] = load(block.sums + (n + j) * block.step + m);
      transpose(rows);
      const int64_t columns = block.count - n, count = num_rows - m;
      const __mmask16 valid = columns >= kTile ? ~(__mmask16)0 : (__mmask16)((1u << columns) - 1);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; i++) {
        if (i >= count) break;
        store_row(rows[i], valid, y + (m + i) * N + block.n0 + n);
      }
    }
  }
}

static Block block_of(int64_t b, int64_t N, int64_t step, float* scratch) {
  const int64_t n0 = b * kOutputs, count = N - n0 < kOutputs ? N - n0 : kOutputs;
  return {n0, count, scratch, scratch + kOutputs * step, step, (Bf16*)(scratch + kOutputs * (step + kOutputs))};
}

static void products(const TilesJob& job, int64_t block_begin, int64_t block_end, float* scratch) {
  const Weights& w = job.weights;
  configure();
  for (int64_t b = block_begin; b < block_end; b++) {
    const Block block = block_of(b, w.N, job.padded_rows, scratch);
    start_sums(job, block);
    if (job.streams.base) {
      with_type(w.base_dtype, w.base, [&](const auto* base) { add_base(job, block, base); });
    }
    with_type(w.deltas_dtype, w.deltas, [&](const auto* deltas) { add_copies(job, block, deltas); });
    store_outputs(block, job.rows, w.N, job.y);
  }
  release();
}

template <typename Weight>
CLP_INLINE void add_term(const TileSums& job, const Block& block, const TileTerm& term, const Weight* weight) {
  const Weight* rows = weight + block.n0 * term.length;
  const int64_t length = term.length;
  if (term.parts > 2) {
    const Streams<Weight, 3> streams{rows, length, block.count, length, nullptr, 1};
    add_streams(block, streams, term.rows, job.rows, nullptr, term.rest);
  } else {
    const Streams<Weight> streams{rows, length, block.count, length, nullptr, 1};
    add_streams(block, streams, term.rows, job.rows, nullptr, term.rest);
  }
}

static void sums(const TileSums& job, int64_t block_begin, int64_t block_end, float* scratch) {
  configure();
  for (int64_t b = block_begin; b < block_end; b++) {
    const Block block = block_of(b, job.N, job.padded_rows, scratch);
    for (int64_t n = 0; n < block.count; n++) {
      const Vec first = splat(job.bias ? job.bias[block.n0 + n] : 0.0f);
      for (int64_t i = 0; i < block.step; i += kWidth) store(block.sums + n * block.step + i, first);
    }
    for (int64_t i = 0; i < job.num_terms; i++) {
      const TileTerm& term = job.terms[i];
      with_type(term.dtype, term.weight, [&](const auto* weight) { add_term(job, block, term, weight); });
    }
    if (job.y_dtype == Dtype::bf16) {
      store_outputs(block, job.rows, job.N, (Bf16*)job.y);
    } else {
      store_outputs(block, job.rows, job.N, (float*)job.y);
    }
  }
  release();
}

}  // namespace
}  // namespace amx

extern const TileKernels tile_kernels_amx;
const TileKernels tile_kernels_amx = {amx::kTile, amx::kOutputs, amx::pack, amx::products, amx::sums};

}  // namespace clp

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
