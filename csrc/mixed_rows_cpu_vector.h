// Loops over one row of any length, for operators that work row by row.
//
// Included inside the namespace of an instruction set, after mixed_linear_cpu_vector.h.

// All lanes of a vector.
struct Whole {
  template <typename T>
  CLP_INLINE_MEMBER Vec read(const T* p) const {
    return load(p);
  }
  template <typename T>
  CLP_INLINE_MEMBER void write(T* p, Vec v) const {
    store(p, v);
  }
  CLP_INLINE_MEMBER Vec only(Vec v) const { return v; }
};

// The first `count` lanes: the others are read as zero and never written.
struct Part {
  int64_t count;

  template <typename T>
  CLP_INLINE_MEMBER Vec read(const T* p) const {
    float lane[kWidth] = {};
    for (int64_t i = 0; i < count; i++) lane[i] = load_one(p + i);
    return load(lane);
  }
  template <typename T>
  CLP_INLINE_MEMBER void write(T* p, Vec v) const {
    float lane[kWidth];
    store(lane, v);
    for (int64_t i = 0; i < count; i++) store_one(p + i, lane[i]);
  }
  CLP_INLINE_MEMBER Vec only(Vec v) const {
    for (int64_t i = count; i < kWidth; i++) v[i] = 0.0f;
    return v;
  }
};

constexpr int kSums = 4;  // partial sums of a reduction over a row: one alone would wait for its own additions

// body(d, lanes, i) for each vector of a row; i < kSums is the partial sum that it may add to.
template <typename Body>
CLP_INLINE void for_row(int64_t D, const Body& body) {
  int64_t d = 0;
  for (; d + kSums * kWidth <= D; d += kSums * kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; i++) body(d + i * kWidth, Whole{}, i);
  }
  for (; d + kWidth <= D; d += kWidth) body(d, Whole{}, 0);
  if (d < D) body(d, Part{D - d}, 0);
}

#define CLP_BODY [&](int64_t d, auto lanes, [[maybe_unused]] int i) __attribute__((always_inline))

struct RowSum {
  Vec part[kSums];

  CLP_INLINE_MEMBER RowSum() {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; i++) part[i] = splat(0.0f);
  }
  CLP_INLINE_MEMBER float total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

template <typename A, typename B>
CLP_INLINE float dot_row(const A* a, const B* b, int64_t D) {
  RowSum sum;
  for_row(D, CLP_BODY { sum.part[i] += lanes.read(a + d) * lanes.read(b + d); });
  return sum.total();
}

// to += factor * from
template <typename From>
CLP_INLINE void add_scaled(float factor, const From* from, int64_t D, float* to) {
  for_row(D, CLP_BODY { lanes.write(to + d, lanes.read(to + d) + factor * lanes.read(from + d)); });
}

CLP_INLINE void clear_row(float* row, int64_t size) {
  for (int64_t i = 0; i < size; i++) row[i] = 0.0f;
}
