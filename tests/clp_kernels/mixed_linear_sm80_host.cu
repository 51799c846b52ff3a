// Runs the device arithmetic of the CUDA decode kernels on the host, for test_cuda_source.py.
#include <cstring>
#include <deque>
#include <vector>

#include "mixed_linear_sm80.cuh"
#include "mixed_linear_sm80_mma.cuh"
using namespace clp;

// The scalar form: one lane after the other, joined in the kernel's butterfly.
template <int ROWS, int FEATURES, bool ALIGNED, typename X, typename W>
void run_lanes(const DecodeArguments<X, W>& a) {
  for (int64_t row = 0; row < a.M; row += ROWS)
    for (int64_t feature = 0; feature < a.N; feature += FEATURES) {
      float total[kLanes][FEATURES][ROWS], next[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        sum_lane<ROWS, FEATURES, ALIGNED>(a, lane, row, feature, total[lane]);
      for (int f = 0; f < FEATURES; ++f)
        for (int r = 0; r < ROWS; ++r) {
          for (int distance = kLanes / 2; distance > 0; distance /= 2) {
            for (int lane = 0; lane < kLanes; ++lane) next[lane] = total[lane][f][r] + total[lane ^ distance][f][r];
            for (int lane = 0; lane < kLanes; ++lane) total[lane][f][r] = next[lane];
          }
          store_result(a, row + r, feature + f, total[f * ROWS + r][f][r]);
        }
    }
}

template <typename X, typename W>
void run_scalar(int variant, const DecodeArguments<X, W>& a) {
  if (variant == 0) run_lanes<1, 1, true>(a);
  if (variant == 1) run_lanes<4, 1, true>(a);
  if (variant == 2) run_lanes<8, 2, true>(a);
  if (variant == 3) run_lanes<4, 1, false>(a);
}

// A warp whose copies land as early as they may (when they start) or as late (when they are waited for).
template <typename T>
struct HostWarp {
  static constexpr int kLanes = 32;
  struct Copy {
    Words* slot;
    Words value;
  };
  const DecodeArguments<T, T>& a;
  bool early;
  bool out_of_bounds = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;

  int first_lane() const { return 0; }
  void copy(Words* slot, const T* source) { copy_or_clear(slot, source, true); }
  void copy_or_clear(Words* slot, const T* source, bool inside) {
    const bool in_base = a.base != nullptr && source >= a.base && source + 8 <= a.base + a.N * a.D;
    const bool in_deltas = source >= a.deltas && source + 8 <= a.deltas + a.N * a.K * a.D;
    if (!in_base && !in_deltas) {
      out_of_bounds = true;
      return;
    }
    Copy next{slot, {}};
    if (inside) std::memcpy(&next.value, source, sizeof(Words));
    if (early) *slot = next.value;
    open.push_back(next);
  }
  void commit() {
    groups.push_back(std::move(open));
    open.clear();
  }
  template <int PENDING>
  void wait() {
    for (; groups.size() > PENDING; groups.pop_front())
      if (!early)
        for (const Copy& copy : groups.front()) *copy.slot = copy.value;
  }
  static double element(const uint32_t& pair, int i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&pair) + 2 * i, 2);
    return widen(value);
  }
  // mma.m16n8k16 by its definition: which lane and register holds which element of the operands is PTX's.
  template <class TILE>
  void multiply(Lane<T, TILE> (&lanes)[32], int i, int f, int v, int half) const {
    double left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint32_t a_words[4], b_words[2];
      left_operand(lanes[lane], i, v, half, a_words);
      right_operand(lanes[lane], f, v, half, b_words);
      for (int j = 0; j < 2; ++j)
        for (int part = 0; part < 2; ++part) {
          left[g][2 * t + 8 * part + j] = element(a_words[2 * part], j);
          left[g + 8][2 * t + 8 * part + j] = element(a_words[2 * part + 1], j);
          right[2 * t + 8 * part + j][g] = element(b_words[part], j);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
        double sum = lanes[lane].sums[i][f][j];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes[lane].sums[i][f][j] = float(sum);
      }
  }
};

template <class TILE, typename T>
int run_blocks(const DecodeArguments<T, T>& a, bool early) {
  const int blocks = (int(a.N) + TILE::kFeatures - 1) / TILE::kFeatures;
  for (int first_row = 0; first_row < a.M; first_row += TILE::kRows)
    for (int block = 0; block < blocks; ++block) {
      const int first_feature = find_first_feature<TILE>(a, block);
      std::vector<Words> rings(TILE::kSharedBytes / sizeof(Words));
      std::memset(rings.data(), 0xff, TILE::kSharedBytes);  // NaN
      for (int warp = 0; warp < TILE::kWarps; ++warp) {
        HostWarp<T> machine{a, early};
        Lane<T, TILE> lanes[32];
        Words* ring = rings.data() + warp * TILE::kRing;
        run_warp(machine, a, warp, first_row, first_feature, ring, lanes);
        if (machine.out_of_bounds) return 1;
        for (const auto& lane : lanes) store_totals(lane, ring);
      }
      for (int thread = 0; thread < 32 * TILE::kWarps; ++thread)
        store_results<T, TILE>(a, thread, first_row, first_feature, rings.data());
    }
  return 0;
}

template <typename T>
int run_mma(int variant, const DecodeArguments<T, T>& a) {
  if (variant / 2 == 0) return run_blocks<MmaFew>(a, variant % 2);
  if (variant / 2 == 1) return run_blocks<MmaSome>(a, variant % 2);
  if (variant / 2 == 2) return run_blocks<MmaMore>(a, variant % 2);
  return run_blocks<MmaMany>(a, variant % 2);
}

// Variants 0 to 3: the scalar form's. From 10 on the tensor cores', each with late copies and with early ones.
template <typename X, typename W>
int run_variant(int variant, void** p, const int64_t* n) {
  const DecodeArguments<X, W> a{(X*)p[0], (X*)p[1], (W*)p[2], (float*)p[3], (int32_t*)p[4], (X*)p[5], (W*)p[6],
                                (X*)p[7], n[0], n[1], n[2], n[3]};
  if (variant < 10) {
    run_scalar(variant, a);
    return 0;
  }
  if constexpr (std::is_same_v<X, W> && sizeof(X) == 2) return run_mma(variant - 10, a);
  return 2;
}

extern "C" int run_on_host(int dtypes, int variant, void** p, const int64_t* n) {
  if (dtypes == 0) return run_variant<float, float>(variant, p, n);
  if (dtypes == 1) return run_variant<__half, __half>(variant, p, n);
  if (dtypes == 2) return run_variant<__half, float>(variant, p, n);
  if (dtypes == 3) return run_variant<__nv_bfloat16, __nv_bfloat16>(variant, p, n);
  return run_variant<__nv_bfloat16, float>(variant, p, n);
}
