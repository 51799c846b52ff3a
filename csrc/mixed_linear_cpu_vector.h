// Vectors of kWidth floats in the compiler's own vector types: the same source gives SSE2, NEON, AVX2 and AVX-512 code.
//
// Included once per instruction set, inside that set's namespace, after its target pragma.

#define CLP_INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecInt __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecUint __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kWidth * 2)));

CLP_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The upper half of a float32 is the bfloat16. GCC 12 makes 5 instructions of the conversion where there is one.
CLP_INLINE Vec load(const Bf16* p) {
#if CLP_WIDTH == 16
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif CLP_WIDTH == 8
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  VecHalf half;
  __builtin_memcpy(&half, p, sizeof(half));
  const VecUint bits = __builtin_convertvector(half, VecUint) << 16;
  return (Vec)bits;
#endif
}

CLP_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

CLP_INLINE float load_one(const float* p) { return *p; }

// Every float16 is a float32 times 2^-112 with the bits moved by 13, but for infinities and NaNs.
CLP_INLINE float load_one(const Half* p) {
  const uint32_t magnitude = (uint32_t)(p->bits & 0x7fff) << 13, sign = (uint32_t)(p->bits & 0x8000) << 16;
  float value;
  __builtin_memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits |= sign | ((p->bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

CLP_INLINE Vec load(const Half* p) {
  Vec v;
#ifdef CLP_F16C
  for (int i = 0; i < kWidth; i += 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i)));
    __builtin_memcpy((char*)&v + 4 * i, &wide, 32);
  }
#else
  for (int i = 0; i < kWidth; i++) v[i] = load_one(p + i);
#endif
  return v;
}

CLP_INLINE float load_one(const Bf16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

CLP_INLINE void store_one(float* p, float value) { *p = value; }

// Rounds to nearest, ties to even; a NaN stays one.
CLP_INLINE void store_one(Bf16* p, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = (uint16_t)(value != value ? 0x7fc0 : rounded);
}

CLP_INLINE void store_one(Half* p, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude > 0x7f800000) {
    rounded = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest, 65504
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000) {   // subnormal: the addition rounds to multiples of 2^-24
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    small += 0.5f;
    __builtin_memcpy(&rounded, &small, 4);
    rounded -= 0x3f000000;
  } else {
    rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  }
  p->bits = (uint16_t)(sign | rounded);
}

// The bits of float32 values rounded to bfloat16, in the upper halves of the lanes: as store_one rounds.
CLP_INLINE VecUint round_to_bf16(Vec value) {
  const VecUint bits = (VecUint)value;
  const VecUint rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecUint is_nan = (VecUint)(value != value);
  return ((rounded & ~is_nan) | (is_nan & 0x7fc00000)) & 0xffff0000;
}

CLP_INLINE void store(Bf16* p, Vec v) {
  const VecHalf half = __builtin_convertvector(round_to_bf16(v) >> 16, VecHalf);
  __builtin_memcpy(p, &half, sizeof(half));
}

// Past the caches, for what is not read soon: the line is not read first. `p` is a multiple of the size of what is
// stored; other threads see it after end_streams().
CLP_INLINE void stream(float* p, Vec v) {
#if defined(CLP_F16C) && CLP_WIDTH == 16
  _mm512_stream_ps(p, (__m512)v);
#elif defined(CLP_F16C)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

CLP_INLINE void stream(Bf16* p, Vec v) {
  const VecHalf half = __builtin_convertvector(round_to_bf16(v) >> 16, VecHalf);
#if defined(CLP_F16C) && CLP_WIDTH == 16
  _mm256_stream_si256((__m256i*)p, (__m256i)half);
#elif defined(CLP_F16C)
  _mm_stream_si128((__m128i*)p, (__m128i)half);
#else
  __builtin_memcpy(p, &half, sizeof(half));
#endif
}

static inline void end_streams() {
#ifdef CLP_F16C
  _mm_sfence();
#endif
}

CLP_INLINE void store(Half* p, Vec v) {
#ifdef CLP_F16C
  for (int i = 0; i < kWidth; i += 8) {
    __m256 wide;
    __builtin_memcpy(&wide, (const char*)&v + 4 * i, 32);
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < kWidth; i++) store_one(p + i, v[i]);
#endif
}

CLP_INLINE void stream(Half* p, Vec v) { store(p, v); }

// Calls `function` with the pointer in the dtype's type.
template <typename Function>
CLP_INLINE void with_type(Dtype dtype, const void* values, const Function& function) {
  switch (dtype) {
    case Dtype::f32:
      return function((const float*)values);
    case Dtype::bf16:
      return function((const Bf16*)values);
    case Dtype::f16:
      return function((const Half*)values);
  }
}

// Calls `function` with null pointers of both dtypes' types.
template <typename Function>
CLP_INLINE void with_types(Dtype first, Dtype second, const Function& function) {
  with_type(first, nullptr, [&](const auto* a) { with_type(second, nullptr, [&](const auto* b) { function(a, b); }); });
}

// value - 0 is value for every value, so this is one broadcast; 0 + value would be an addition, for the sake of -0.
CLP_INLINE Vec splat(float value) { return value - (Vec){}; }

// Sums the lanes pairwise, always in the same order.
CLP_INLINE float sum_lanes(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Adds lanes l and l + half of each vector in groups of 2 * half lanes: of the first vector into the lower half of each
// group, of the second into the upper one. A blend and one shuffle: two shuffles would wait for the one port that has
// them.
template <int half>
CLP_INLINE Vec add_halves(Vec a, Vec b) {
  Vec here, there;
#if defined(__clang__)
  for (int i = 0; i < kWidth; i++) {
    here[i] = (i & half) ? b[i] : a[i];
    there[i] = (i & half) ? b[i - half] : a[i + half];
  }
#else
  VecInt of_here, of_there;
  for (int i = 0; i < kWidth; i++) {
    of_here[i] = (i & half) ? kWidth + i : i;
    of_there[i] = (i & half) ? kWidth + i - half : i + half;
  }
  here = __builtin_shuffle(a, b, of_here);
  there = __builtin_shuffle(a, b, of_there);
#endif
  return here + there;
}

template <int half>
CLP_INLINE void sum_lanes_step(Vec (&vectors)[kWidth]) {
  if constexpr (half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < half; i++) vectors[i] = add_halves<half>(vectors[i], vectors[i + half]);
    sum_lanes_step<half / 2>(vectors);
  }
}

// Lane i: the sum of vector i's lanes, the bits of sum_lanes. One addition and two shuffles for two vectors in each
// step, where sum_lanes goes through memory for each vector.
CLP_INLINE Vec sum_lanes_of_all(Vec (&vectors)[kWidth]) {
  sum_lanes_step<kWidth / 2>(vectors);
  return vectors[0];
}

// One step of a transposition: lanes with bit `step` set change places between the two vectors.
template <int step>
CLP_INLINE void exchange(Vec& a, Vec& b) {
  VecInt low, high;
  for (int i = 0; i < kWidth; i++) {
    low[i] = (i & step) ? kWidth + i - step : i;
    high[i] = (i & step) ? kWidth + i : i + step;
  }
#if defined(__clang__)
  Vec new_a, new_b;
  for (int i = 0; i < kWidth; i++) {
    new_a[i] = (i & step) ? b[i - step] : a[i];
    new_b[i] = (i & step) ? b[i] : a[i + step];
  }
  a = new_a;
  b = new_b;
#else
  const Vec new_a = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = new_a;
#endif
}

template <int step>
CLP_INLINE void transpose_step(Vec (&rows)[kWidth]) {
  if constexpr (step < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) {
      if (!(i & step)) exchange<step>(rows[i], rows[i + step]);
    }
    transpose_step<step * 2>(rows);
  }
}

// Transposes kWidth vectors in registers.
CLP_INLINE void transpose(Vec (&rows)[kWidth]) { transpose_step<1>(rows); }
