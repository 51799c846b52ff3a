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

// The upper half of a float32 is the bfloat16.
CLP_INLINE Vec load(const Bf16* p) {
  VecHalf half;
  __builtin_memcpy(&half, p, sizeof(half));
  const VecUint bits = __builtin_convertvector(half, VecUint) << 16;
  return (Vec)bits;
}

CLP_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

CLP_INLINE float load_one(const float* p) { return *p; }

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
