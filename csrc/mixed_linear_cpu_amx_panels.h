// Operands of AMX's products: rows of x and rows of weights as tiles.
//
// Included inside the namespace of the kernels, after the sizes of a tile.

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
// stream that is no bfloat16 has two parts, whose sum has at least 16 bits of each float32, or three, which have all.
struct Panel {
  const char *low, *high;    // outputs 0 to 15, 16 to 31
  int64_t row_step, tile_step;
  int64_t parts, part_step;
  int64_t ahead;             // from here to what is to be fetched ahead; 0: nothing
};

// The upper halves of 32 float32s.
CLP_INLINE __m512i upper_halves(const __m512i (&bits)[2]) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(bits[0], odd, bits[1]);
}

// 32 values of a row of weights as `parts` bfloat16s each, `step` apart: the upper half of a float32, then that of the
// rest of it, the last one rounded.
template <int parts, typename Weight>
CLP_INLINE void split(const Weight* from, int64_t count, Bf16* out, int64_t step) {
  Vec left[2];
  if (count >= kTerms) {
    left[0] = load(from);
    left[1] = load(from + kWidth);
  } else {
    alignas(64) float values[kTerms] = {};
    for (int64_t i = 0; i < count; i++) values[i] = load_one(from + i);
    left[0] = load(values);
    left[1] = load(values + kWidth);
  }
  const __m512i mask = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 2
  for (int part = 0; part + 1 < parts; part++) {
    __m512i bits[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      bits[i] = _mm512_and_si512((__m512i)left[i], mask);
      left[i] -= (Vec)bits[i];
    }
    _mm512_store_si512(out + part * step, upper_halves(bits));
  }
  _mm512_store_si512(out + (parts - 1) * step, (__m512i)_mm512_cvtne2ps_pbh((__m512)left[1], (__m512)left[0]));
}

template <int parts>
CLP_INLINE void split(const Bf16* from, int64_t count, Bf16* out, int64_t) {
  const __mmask32 valid = count >= kTerms ? ~(__mmask32)0 : (__mmask32)(((uint64_t)1 << count) - 1);
  _mm512_store_si512(out, _mm512_maskz_loadu_epi16(valid, from));
}

constexpr bool is_bfloat16(const Bf16*) { return true; }
constexpr bool is_bfloat16(const void*) { return false; }

// The rows of `count` outputs, row_step apart, of one stream, or of those that `copies` lists.
template <typename Weight, int most_parts = 2>
struct Streams {
  const Weight* rows;
  int64_t row_step, count, D;
  const int32_t* copies;     // null: one stream
  int64_t num_copies;

  static constexpr int parts = is_bfloat16((const Weight*)nullptr) ? 1 : most_parts;
  CLP_INLINE_MEMBER const Weight* at(int64_t a) const { return rows + (copies ? copies[a] * D : 0); }
  // Whether the rows, as they lie in memory, are rows of tiles.
  CLP_INLINE_MEMBER bool are_tiles() const { return parts == 1 && D % kTerms == 0 && count % kTile == 0; }
};

// The streams as tiles in `scratch`, one stream after the other, in the order of memory and two outputs side by side,
// each row fetched ahead. Measured with K = 2 float32 copies beside a bfloat16 base, 2048 x 2048, 32 rows, one core,
// weights in memory, in units of the time of a sum over the same bytes: 1.4 to 1.6, as with one output or four side by
// side; 128 terms of all outputs at once, to stay in the first-level cache, 1.6 to 2.1.
template <typename Weight, int most_parts>
static void copy_to_tiles(const Streams<Weight, most_parts>& streams, Bf16* scratch) {
  constexpr int parts = Streams<Weight, most_parts>::parts;
  constexpr int64_t together = 2, line = 64 / sizeof(Weight), ahead = 8 * line;
  const int64_t D = streams.D, part = kOutputs * tile_terms(D);
  if (streams.count < kOutputs) __builtin_memset(scratch, 0, streams.num_copies * parts * part * sizeof(Bf16));
  for (int64_t n = 0; n < streams.count; n += together) {
    const int64_t outputs = streams.count - n < together ? streams.count - n : together;
    for (int64_t a = 0; a < streams.num_copies; a++) {
      const Weight* first = streams.at(a) + n * streams.row_step;
      Bf16* to = scratch + a * parts * part + n * kTerms;
      for (int64_t d = 0; d < D; d += kTerms, to += kOutputs * kTerms) {
        const int64_t next = d + ahead < D ? d + ahead : d + ahead - D + together * streams.row_step;
        for (int64_t i = 0; i < outputs; i++) {
          const Weight* row = first + i * streams.row_step;
          for (int64_t t = 0; t < kTerms; t += line) __builtin_prefetch(row + next + t);
          split<parts>(row + d, D - d, to + i * kTerms, part);
        }
      }
    }
  }
}

// Stream `a` as tiles: where it lies in memory, or as copy_to_tiles has left it.
template <typename Weight, int most_parts>
static Panel panel_of(const Streams<Weight, most_parts>& streams, int64_t a, const Bf16* scratch) {
  if (streams.are_tiles()) {
    const char* first = (const char*)streams.at(a);
    const int64_t step = streams.row_step * sizeof(Weight);
    return {first, first + kTile * step, step, kTerms * sizeof(Weight), 1, 0, kOutputs * step};
  }
  const int64_t part = kOutputs * tile_terms(streams.D), parts = streams.parts;
  const char* first = (const char*)(scratch + a * parts * part);
  const int64_t tile = kTileSize * sizeof(Bf16), row = kTerms * sizeof(Bf16);
  return {first, first + tile, row, 2 * tile, parts, part * (int64_t)sizeof(Bf16), 0};
}
