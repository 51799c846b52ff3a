// Products of many bfloat16 rows with mixed weights by Intel AMX's tiles; run only where the processor has them and the
// operating system has granted them.
#include "cpu_amx.h"

#ifdef CLP_AMX
#include <immintrin.h>

#include "mixed_linear_cpu_tile_product.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define CLP_WIDTH 16
#define CLP_F16C
#define CLP_INLINE_MEMBER inline __attribute__((always_inline))

namespace clp {
namespace amx_product {
namespace {

constexpr int kWidth = CLP_WIDTH;

#include "mixed_linear_cpu_vector.h"

#include "mixed_linear_cpu_amx_tiles.h"

CLP_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kWidth ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

CLP_INLINE Vec load_lanes(const float* p, __mmask16 lanes) { return (Vec)_mm512_maskz_loadu_ps(lanes, p); }

CLP_INLINE Vec load_lanes(const Bf16* p, __mmask16 lanes) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16);
}

CLP_INLINE Vec load_lanes(const Half* p, __mmask16 lanes) {
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}

// Two vectors' bfloat16s, the first one's in the lower lanes.
CLP_INLINE __m512i rounded(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// Lane i of each half as pair i.
CLP_INLINE Vec interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, halves);
}

// The upper half of a float32, as one, which is left of it.
CLP_INLINE Vec take_upper(Vec& value) {
  const Vec upper = (Vec)_mm512_and_si512((__m512i)value, _mm512_set1_epi32((int)0xffff0000));
  value -= upper;
  return upper;
}

CLP_INLINE void store_tile_row(Bf16* to, Vec row) { _mm512_storeu_si512(to, (__m512i)row); }

// A tile's 16 vectors of pairs, transposed.
CLP_INLINE void store_transposed(Bf16* to, Vec (&pairs)[kWidth]) {
  transpose(pairs);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; i++) store_tile_row(to + i * kTerms, pairs[i]);
}

static const Bf16* row_of(const Bf16* values, int64_t step, const int32_t* order, int64_t row) {
  return values + (order ? order[row] : row) * step;
}

// Terms [t, t + 32) of rows [16 tile, ...) as they lie in memory.
static void pack_left_rows(const LeftTiles& job, int64_t tile, Bf16* out) {
  for (int64_t i = 0; i < kTile; i++) {
    const int64_t row = tile * kTile + i;
    const Bf16* from = row_of(job.values, job.step, job.order, row < job.rows ? row : 0);
    Bf16* to = out + i * kTerms;
    for (int64_t t = 0; t < job.terms; t += kTerms, to += kTileSize) {
      const int64_t left = row < job.rows ? job.terms - t : 0;
      const __mmask32 lanes = left >= kTerms ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << left) - 1);
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(lanes, from + t));
    }
  }
}

// Two rows of memory are a pair of terms of each of 16 rows.
static void pack_left_columns(const LeftTiles& job, int64_t tile, Bf16* out) {
  const __mmask16 lanes = first_lanes(job.rows - tile * kTile);
  for (int64_t t = 0; t < job.terms; t += kTerms, out += kTileSize) {
    Vec pairs[kWidth];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; i++) {
      __m256i pair[2];
#pragma GCC unroll 2
      for (int64_t p = 0; p < 2; p++) {
        const int64_t term = t + 2 * i + p;
        const Bf16* from = row_of(job.values, job.step, job.order, term < job.terms ? term : t) + tile * kTile;
        pair[p] = _mm256_maskz_loadu_epi16(term < job.terms ? lanes : 0, from);
      }
      pairs[i] = interleave(_mm512_inserti64x4(_mm512_castsi256_si512(pair[0]), pair[1], 1));
    }
    store_transposed(out, pairs);
  }
}

static void pack_left(const LeftTiles& job, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    Bf16* out = job.out + tile * job.out_step;
    job.transposed ? pack_left_columns(job, tile, out) : pack_left_rows(job, tile, out);
  }
}

constexpr bool is_bfloat16(const Bf16*) { return true; }
constexpr bool is_bfloat16(const void*) { return false; }

// Where a source's weights lie: in the first copy, or in the base alone, and in the base beside it.
template <typename Weight>
struct Place {
  const Weight* at;
  const Bf16* beside;

  CLP_INLINE_MEMBER Place operator+(int64_t size) const { return {at + size, beside ? beside + size : nullptr}; }
};

// The base (copies = 0), or the mix of so many copies; -1: of any number. `on_base`: with the base beside them.
template <typename Weight, int copies, bool on_base>
class Source {
 public:
  CLP_INLINE_MEMBER explicit Source(const RightTiles& job, const Weight* weights)
      : job_(job), weights_(weights), row_(copies == 0 ? job.weights.D : job.weights.K * job.weights.D) {
    for (int64_t a = 0; a < copies; a++) {
      at_[a] = job.mix.copies[a] * job.weights.D;
      c_[a] = splat(job.mix.c[a]);
    }
  }

  // Weights of output n from input d on.
  CLP_INLINE_MEMBER Place<Weight> place(int64_t n, int64_t d) const {
    if (job_.order) n = job_.order[n];
    return {weights_ + n * row_ + d, on_base ? (const Bf16*)job_.weights.base + n * job_.weights.D + d : nullptr};
  }

  // 16 weights; those past the lanes are zero.
  CLP_INLINE_MEMBER Vec at(const Place<Weight>& place, __mmask16 lanes) const {
    if constexpr (copies == 0) return load_lanes(place.at, lanes);
    Vec sum = on_base ? load_lanes(place.beside, lanes) : splat(0.0f);
    for (int64_t a = 0; a < count(); a++) sum += load_lanes(place.at + offset(a), lanes) * c(a);
    return sum;
  }

  // 32 weights, rounded to 16 pairs.
  CLP_INLINE_MEMBER Vec pairs(const Place<Weight>& place, int64_t left) const {
    if constexpr (is_bfloat16((const Weight*)nullptr)) {
      const __mmask32 lanes = left >= kTerms ? ~(__mmask32)0 : left <= 0 ? 0 : ((__mmask32)1 << left) - 1;
      if constexpr (copies == 0) return (Vec)_mm512_maskz_loadu_epi16(lanes, place.at);
      Vec even = splat(0.0f), odd = splat(0.0f);
      if constexpr (on_base) {
        odd = (Vec)_mm512_maskz_loadu_epi16(lanes, place.beside);
        even = evens_of(odd);
      }
      for (int64_t a = 0; a < count(); a++) {
        Vec odds = (Vec)_mm512_maskz_loadu_epi16(lanes, place.at + offset(a));
        const Vec evens = evens_of(odds);
        even += evens * c(a);
        odd += odds * c(a);
      }
      return interleave(rounded(even, odd));
    } else {
      return (Vec)rounded(at(place, first_lanes(left)), at(place + kWidth, first_lanes(left - kWidth)));
    }
  }

  // Rows of several outputs side by side are no stream to the processor's own prefetcher.
  CLP_INLINE_MEMBER void fetch(const Place<Weight>& place) const {
    if constexpr (copies == 0) __builtin_prefetch(place.at);
    if constexpr (on_base) __builtin_prefetch(place.beside);
    for (int64_t a = 0; a < count(); a++) __builtin_prefetch(place.at + offset(a));
  }

 private:
  // The even ones of 32 bfloat16s as float32s; the odd ones stay.
  CLP_INLINE_MEMBER static Vec evens_of(Vec& odd) {
    const Vec even = (Vec)_mm512_slli_epi32((__m512i)odd, 16);
    odd = (Vec)_mm512_and_si512((__m512i)odd, _mm512_set1_epi32((int)0xffff0000));
    return even;
  }

  CLP_INLINE_MEMBER int64_t count() const { return copies < 0 ? job_.mix.count : copies; }
  CLP_INLINE_MEMBER int64_t offset(int64_t a) const {
    if constexpr (copies < 0) return job_.mix.copies[a] * job_.weights.D;
    return at_[a];
  }
  CLP_INLINE_MEMBER Vec c(int64_t a) const {
    if constexpr (copies < 0) return splat(job_.mix.c[a]);
    return c_[a];
  }

  const RightTiles& job_;
  const Weight* const weights_;
  const int64_t row_;
  int64_t at_[copies > 0 ? copies : 1];
  Vec c_[copies > 0 ? copies : 1];
};

// A tile of columns n by terms d: each row of memory becomes a vector of pairs, and these change places. Row after row
// into `out`, as rows of tiles, and from there: the processor's own prefetcher follows few streams.
template <int parts, typename Source>
static void pack_columns(const RightTiles& job, const Source& source, int64_t tile, Bf16* out) {
  const int64_t n0 = job.j0 + tile * kTile, count = job.j1 - n0, terms = job.i1 - job.i0;
  for (int64_t i = 0; i < kTile; i++) {
    auto row = source.place(n0 + (i < count ? i : 0), job.i0);
    Bf16* to = out + i * kTerms;
    for (int64_t left = terms; left > 0; left -= kTerms, row = row + kTerms, to += kTileSize) {
      const int64_t lanes = i < count ? left : 0;
      if constexpr (parts == 2) {
        Vec first = source.at(row, first_lanes(lanes)), second = source.at(row + kWidth, first_lanes(lanes - kWidth));
        const Vec upper_first = take_upper(first), upper_second = take_upper(second);
        store_tile_row(to, (Vec)rounded(upper_first, upper_second));
        store_tile_row(to + job.part_step, (Vec)rounded(first, second));
      } else {
        store_tile_row(to, source.pairs(row, lanes));
      }
    }
  }
  for (int64_t t = 0; t < terms; t += kTerms, out += kTileSize) {
#pragma GCC unroll 2
    for (int part = 0; part < parts; part++) {
      Bf16* const to = out + part * job.part_step;
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; i++) rows[i] = (Vec)_mm512_loadu_si512(to + i * kTerms);
      store_transposed(to, rows);
    }
  }
}

constexpr int64_t kAhead = 8;

// A tile of columns d by terms n: two rows of memory become pairs.
template <int parts, int line, typename Source>
static void pack_rows(const RightTiles& job, const Source& source, int64_t tile_begin, int64_t tile_end) {
  const int64_t terms = job.i1 - job.i0, size = (terms + kTerms - 1) / kTerms * kTileSize;
  const int64_t d0 = job.j0 + tile_begin * kTile, d1 = job.j0 + tile_end * kTile;
  for (int64_t t = 0; t < terms; t += 2) {
    const int64_t n = job.i0 + t;
    const bool is_pair = t + 1 < terms;
    auto row = source.place(n, d0), next = source.place(is_pair ? n + 1 : n, d0);
    if (t + kAhead + 1 < terms) {
      const auto later = source.place(n + kAhead, d0), after = source.place(n + kAhead + 1, d0);
      for (int64_t d = 0; d < d1 - d0; d += line) {
        source.fetch(later + d);
        source.fetch(after + d);
      }
    }
    Bf16* to = job.out + tile_begin * size + t * kTile;
    for (int64_t d = d0; d < d1; d += kTile, row = row + kTile, next = next + kTile, to += size) {
      const __mmask16 lanes = first_lanes(job.j1 - d);
      Vec first = source.at(row, lanes), second = source.at(next, is_pair ? lanes : 0);
      if constexpr (parts == 2) {
        const Vec upper_first = take_upper(first), upper_second = take_upper(second);
        store_tile_row(to, interleave(rounded(upper_first, upper_second)));
      }
      store_tile_row(to + (parts - 1) * job.part_step, interleave(rounded(first, second)));
    }
  }
  for (int64_t t = (terms + 1) / 2 * 2; t % kTerms != 0; t += 2) {
    for (int64_t tile = tile_begin; tile < tile_end; tile++) {
      for (int part = 0; part < parts; part++) {
        store_tile_row(job.out + tile * size + t * kTile + part * job.part_step, splat(0.0f));
      }
    }
  }
}

template <int parts, int copies, bool on_base, typename Weight>
static void pack_source(const RightTiles& job, const Weight* weights, int64_t tile_begin, int64_t tile_end) {
  const Source<Weight, copies, on_base> source(job, weights);
  if (job.transposed) return pack_rows<parts, 64 / sizeof(Weight)>(job, source, tile_begin, tile_end);
  const int64_t size = (job.i1 - job.i0 + kTerms - 1) / kTerms * kTileSize;
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    pack_columns<parts>(job, source, tile, job.out + tile * size);
  }
}

template <int parts, bool on_base, typename Weight>
static void pack_mix(const RightTiles& job, const Weight* weights, int64_t tile_begin, int64_t tile_end) {
  switch (job.mix.count) {
    case 1:
      return pack_source<parts, 1, on_base>(job, weights, tile_begin, tile_end);
    case 2:
      return pack_source<parts, 2, on_base>(job, weights, tile_begin, tile_end);
    case 4:
      return pack_source<parts, 4, on_base>(job, weights, tile_begin, tile_end);
    default:
      return pack_source<parts, -1, on_base>(job, weights, tile_begin, tile_end);
  }
}

static void pack_right(const RightTiles& job, int64_t tile_begin, int64_t tile_end) {
  const Weights& w = job.weights;
  if (job.mix.base && job.mix.count > 0) {
    if (w.deltas_dtype == Dtype::bf16) return pack_mix<1, true>(job, (const Bf16*)w.deltas, tile_begin, tile_end);
    return pack_mix<1, true>(job, (const float*)w.deltas, tile_begin, tile_end);
  }
  if (job.mix.base) {
    return with_type(w.base_dtype, w.base, [&](const auto* weights) {
      job.parts == 2 ? pack_source<2, 0, false>(job, weights, tile_begin, tile_end)
                     : pack_source<1, 0, false>(job, weights, tile_begin, tile_end);
    });
  }
  with_type(w.deltas_dtype, w.deltas, [&](const auto* weights) {
    job.parts == 2 ? pack_mix<2, false>(job, weights, tile_begin, tile_end)
                   : pack_mix<1, false>(job, weights, tile_begin, tile_end);
  });
}

// One block of out, up to two by two tiles.
template <bool two_left, bool two_right>
static __attribute__((noinline)) void multiply(const TileProduct& job, const Bf16* left, int64_t right_at,
                                               float* out) {
  const int64_t out_bytes = job.out_step * 4, step = job.term_tiles * kTileSize;
  if (job.add) {
    CLP_TILE_LOAD(0, out, out_bytes);
    if (two_right) CLP_TILE_LOAD(1, out + kTile, out_bytes);
    if (two_left) CLP_TILE_LOAD(2, out + kTile * job.out_step, out_bytes);
    if (two_left && two_right) CLP_TILE_LOAD(3, out + kTile * job.out_step + kTile, out_bytes);
  } else {
    CLP_TILE_ZERO(0);
    if (two_right) CLP_TILE_ZERO(1);
    if (two_left) CLP_TILE_ZERO(2);
    if (two_left && two_right) CLP_TILE_ZERO(3);
  }
  for (int64_t t = 0; t < step; t += kTileSize) {
    CLP_TILE_LOAD(4, left + t, 64);
    if (two_left) CLP_TILE_LOAD(5, left + t + job.left_step, 64);
    for (int part = 0; part < job.parts; part++) {
      const Bf16* right = job.right[part] + right_at + t;
      CLP_TILE_LOAD(6, right, 64);
      CLP_TILE_MULTIPLY(0, 4, 6);
      if (two_left) CLP_TILE_MULTIPLY(2, 5, 6);
      if (two_right) {
        CLP_TILE_LOAD(7, right + step, 64);
        CLP_TILE_MULTIPLY(1, 4, 7);
        if (two_left) CLP_TILE_MULTIPLY(3, 5, 7);
      }
    }
  }
  CLP_TILE_STORE(0, out, out_bytes);
  if (two_right) CLP_TILE_STORE(1, out + kTile, out_bytes);
  if (two_left) CLP_TILE_STORE(2, out + kTile * job.out_step, out_bytes);
  if (two_left && two_right) CLP_TILE_STORE(3, out + kTile * job.out_step + kTile, out_bytes);
}

static void product(const TileProduct& job, int64_t left_begin, int64_t left_end) {
  const int64_t step = job.term_tiles * kTileSize;
  configure();
  for (int64_t i = left_begin; i < left_end; i += 2) {
    const bool two_left = left_end - i > 1;
    for (int64_t j = 0; j < job.right_tiles; j += 2) {
      const bool two_right = job.right_tiles - j > 1;
      const auto run = two_left ? (two_right ? multiply<true, true> : multiply<true, false>)
                                : (two_right ? multiply<false, true> : multiply<false, false>);
      run(job, job.left + i * job.left_step, j * step, job.out + i * kTile * job.out_step + j * kTile);
    }
  }
  release();
}

}  // namespace
}  // namespace amx_product

extern const TileProductKernels tile_products_amx;
const TileProductKernels tile_products_amx = {amx_product::kTile, amx_product::kTerms, amx_product::pack_left,
                                              amx_product::pack_right, amx_product::product};

}  // namespace clp

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
