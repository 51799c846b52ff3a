// Products with bfloat16 rows by Intel AMX's tiles (AMX-TILE, AMX-BF16, with AVX-512); run only where the processor has
// them and the operating system has granted them.
//
// A tile is 16 rows of 64 bytes. One instruction multiplies a tile of weights (16 outputs by 32 inputs, as rows of
// weights lie in memory) and a tile of x (16 pairs of inputs by 16 rows of x) and adds to a tile of float32 sums, 16
// outputs by 16 rows of x. Products are exact, denormals count as zero.
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

constexpr int64_t kTile = 16;                    // rows of a tile
constexpr int64_t kTerms = 32;                   // inputs of a tile
constexpr int64_t kTileSize = kTile * kTerms;    // bfloat16s of a tile
constexpr int64_t kOutputs = 2 * kTile;          // of a block
constexpr int64_t kRowsInPlace = 32;             // of x

// The compiler's own functions for tiles do not tell it that they read memory, and take numbers of tiles only as text.
#define CLP_TILE_LOAD(tile, from, step) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(step)) : "memory")
#define CLP_TILE_STORE(tile, to, step) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(step)) : "memory")
#define CLP_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define CLP_TILE_MULTIPLY(sum, weights, x) \
  __asm__ volatile("tdpbf16ps %%tmm" #x ", %%tmm" #weights ", %%tmm" #sum : : :)

// All eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void configure() {
  const TileConfig config;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static void release() { __asm__ volatile("tilerelease" : : :); }

// 16 rows of 32-bit values, each a pair of bfloat16s, become tiles of x: pairs by rows of x. Zero past the last row and
// the last input.
static void pack(const Bf16* x, int64_t rows, int64_t D, int64_t tile_begin, int64_t tile_end, Bf16* out) {
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    for (int64_t d = 0; d < D; d += kTerms) {
      const __mmask32 valid = D - d >= kTerms ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << (D - d)) - 1);
      Vec pairs[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; i++) {
        const int64_t row = tile * kTile + i;
        pairs[i] = (Vec)_mm512_maskz_loadu_epi16(row < rows ? valid : 0, x + (row < rows ? row : 0) * D + d);
      }
      transpose(pairs);
      Bf16* to = out + tile * kTile * tile_terms(D) + d * kTile;
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; i++) __builtin_memcpy(to + i * kTerms, &pairs[i], 64);
    }
  }
}

// 32 outputs' weights of one stream as tiles: rows `row_step` bytes apart, tiles of the same outputs `tile_step`. A
// stream that is no bfloat16 has two parts, whose sum has at least 16 bits of each float32.
struct Panel32 {
  const char *low, *high;   // outputs 0 to 15, 16 to 31
  int64_t row_step, tile_step;
  int64_t parts, part_step;
};

// 32 values of a row of weights as two bfloat16s each, the upper half of a float32 and the rest of it.
template <typename Weight>
CLP_INLINE void split(const Weight* from, int64_t count, Bf16* upper, Bf16* rest) {
  Vec value[2];
  if (count >= kTerms) {
    value[0] = load(from);
    value[1] = load(from + kWidth);
  } else {
    alignas(64) float values[kTerms] = {};
    for (int64_t i = 0; i < count; i++) values[i] = load_one(from + i);
    value[0] = load(values);
    value[1] = load(values + kWidth);
  }
  const __m512i mask = _mm512_set1_epi32((int)0xffff0000);
  Vec left[2];
  __m512i upper_bits[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    upper_bits[i] = _mm512_and_si512((__m512i)value[i], mask);
    left[i] = value[i] - (Vec)upper_bits[i];
  }
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_store_si512(upper, _mm512_permutex2var_epi16(upper_bits[0], odd, upper_bits[1]));
  _mm512_store_si512(rest, (__m512i)_mm512_cvtne2ps_pbh((__m512)left[1], (__m512)left[0]));
}

CLP_INLINE void split(const Bf16* from, int64_t count, Bf16* upper, Bf16*) {
  const __mmask32 valid = count >= kTerms ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << count) - 1);
  _mm512_store_si512(upper, _mm512_maskz_loadu_epi16(valid, from));
}

constexpr bool is_bfloat16(const Bf16*) { return true; }
constexpr bool is_bfloat16(const void*) { return false; }

// The rows of one stream as tiles: where they lie in memory, if they can be read so, else copied into `scratch`.
template <typename Weight>
static Panel32 panel_of(const Weight* rows, int64_t row_step, int64_t count, int64_t D, bool in_place, Bf16* scratch) {
  constexpr bool is_bf16 = is_bfloat16((const Weight*)nullptr);
  if (is_bf16 && in_place && D % kTerms == 0 && count % kTile == 0) {
    const char* first = (const char*)rows;
    return {first, first + kTile * row_step * 2, row_step * 2, 64, 1, 0};
  }
  const int64_t part = kOutputs * tile_terms(D);
  if (count < kOutputs) __builtin_memset(scratch, 0, part * 2 * (is_bf16 ? 1 : 2));
  for (int64_t n = 0; n < count; n++) {
    const Weight* row = rows + n * row_step;
    Bf16* to = scratch + n * kTerms;
    for (int64_t d = 0; d < D; d += kTerms, to += kOutputs * kTerms) {
      __builtin_prefetch(row + row_step + d);
      split(row + d, D - d, to, to + part);
    }
  }
  return {(const char*)scratch, (const char*)(scratch + kTileSize), 64, kOutputs * 64, is_bf16 ? 1 : 2, part * 2};
}

// out[n, i] = <row n of the panel, row i of x>, [32, 32]; x has one tile of rows, or two that are x_step apart.
template <bool two_outputs, bool two_rows>
static __attribute__((noinline)) void multiply(const Panel32& panel, const Bf16* x, int64_t x_step, int64_t tiles,
                                               float* out) {
  CLP_TILE_ZERO(0);
  if (two_rows) CLP_TILE_ZERO(1);
  if (two_outputs) CLP_TILE_ZERO(2);
  if (two_outputs && two_rows) CLP_TILE_ZERO(3);
  for (int64_t part = 0; part < panel.parts; part++) {
    const char *low = panel.low + part * panel.part_step, *high = panel.high + part * panel.part_step;
    const Bf16* rows = x;
    for (int64_t t = 0; t < tiles; t++, low += panel.tile_step, high += panel.tile_step, rows += kTileSize) {
      CLP_TILE_LOAD(6, rows, 64);
      CLP_TILE_LOAD(4, low, panel.row_step);
      CLP_TILE_MULTIPLY(0, 4, 6);
      if (two_rows) {
        CLP_TILE_LOAD(7, rows + x_step, 64);
        CLP_TILE_MULTIPLY(1, 4, 7);
      }
      if (two_outputs) {
        CLP_TILE_LOAD(5, high, panel.row_step);
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

// sums += c * the stream's products, c per row of x (null: 1).
static void add_stream(const TilesJob& job, const Block& block, const Panel32& panel, const float* c) {
  const int64_t tiles = tile_terms(job.weights.D) / kTerms, x_step = tiles * kTileSize;
  const bool two_outputs = block.count > kTile;
  for (int64_t m = 0; m < job.rows; m += 2 * kTile) {
    const bool two_rows = job.rows - m > kTile;
    const auto run = two_outputs ? (two_rows ? multiply<true, true> : multiply<true, false>)
                                 : (two_rows ? multiply<false, true> : multiply<false, false>);
    run(panel, job.x + m / kTile * x_step, x_step, tiles, block.products);
    for (int64_t i = 0; i < (two_rows ? 2 * kTile : kTile); i += kWidth) {
      const Vec factor = c ? load(c + m + i) : splat(1.0f);
      for (int64_t n = 0; n < block.count; n++) {
        float* sum = block.sums + n * block.step + m + i;
        store(sum, load(sum) + factor * load(block.products + n * kOutputs + i));
      }
    }
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

static void store_outputs(const TilesJob& job, const Block& block) {
  const int64_t N = job.weights.N;
  for (int64_t m = 0; m < job.rows; m += kTile) {
    for (int64_t n = 0; n < block.count; n += kTile) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTile; j++) rows[j] = load(block.sums + (n + j) * block.step + m);
      transpose(rows);
      const int64_t columns = block.count - n, count = job.rows - m;
      const __mmask16 valid = columns >= kTile ? ~(__mmask16)0 : (__mmask16)((1u << columns) - 1);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; i++) {
        if (i >= count) break;
        const __m256i rounded = _mm512_cvtepi32_epi16((__m512i)(round_to_bf16(rows[i]) >> 16));
        _mm256_mask_storeu_epi16(job.y + (m + i) * N + block.n0 + n, valid, rounded);
      }
    }
  }
}

// Outputs of `block_begin` and the blocks after it; scratch holds tiles_scratch(job) floats.
static void products(const TilesJob& job, int64_t block_begin, int64_t block_end, float* scratch) {
  const Weights& w = job.weights;
  const int64_t step = job.padded_rows;
  Block block{0, 0, scratch, scratch + kOutputs * step, step, (Bf16*)(scratch + kOutputs * (step + kOutputs))};
  const bool in_place = job.rows <= kRowsInPlace;
  configure();
  for (int64_t b = block_begin; b < block_end; b++) {
    block.n0 = b * kOutputs;
    block.count = w.N - block.n0 < kOutputs ? w.N - block.n0 : kOutputs;
    start_sums(job, block);
    if (job.streams.base) {
      with_type(w.base_dtype, w.base, [&](const auto* base) {
        add_stream(job, block, panel_of(base + block.n0 * w.D, w.D, block.count, w.D, in_place, block.scratch), nullptr);
      });
    }
    for (int64_t a = 0; a < job.streams.count; a++) {
      const int64_t k = job.streams.copies[a], step_n = w.K * w.D;
      with_type(w.deltas_dtype, w.deltas, [&](const auto* deltas) {
        const auto* rows = deltas + block.n0 * step_n + k * w.D;
        add_stream(job, block, panel_of(rows, step_n, block.count, w.D, in_place, block.scratch), job.c + k * step);
      });
    }
    store_outputs(job, block);
  }
  release();
}

}  // namespace
}  // namespace amx

extern const TileKernels tile_kernels_amx;
const TileKernels tile_kernels_amx = {amx::kTile, amx::kOutputs, amx::pack, amx::products};

}  // namespace clp

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
