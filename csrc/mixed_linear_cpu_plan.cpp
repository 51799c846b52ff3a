#include "mixed_linear_cpu_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace clp {

namespace {

// Costs in units of one row through torch's product with one weight, for each stream or segment.
constexpr double kMixStream = 9.0;
constexpr double kPackPanel = 6.0;
constexpr double kOwnRow = 1.1;
constexpr int64_t kSpreadRows = 8;

// By AMX on one Xeon core, 0.10 to 0.15: 1.1 ms for 2048 rows through 576 x 576, the mix and torch's float32 product 9
// to 10.
constexpr double kTileRow = 0.125;

// Tiles of mixes, by the same measure: a row through one of the mix's parts, and the base and a segment's copies made
// into tiles. bfloat16, 2048 x 2048, two Xeon threads, ms: 512 rows, K = 2 5.0 (7.7 by streams), K = 4 5.8 (11.8); 8
// segments of 128, K = 2 13.3 (13.9).
constexpr double kTileMixRow = 0.08, kTileBase = 13.0, kTileCopy = 10.0;
constexpr int64_t kTilePadding = 8;  // rows, on average, that a segment's last tile lacks

// Rows up to which dot products read the streams at least as fast as tiles do: as they lie in memory, not 32 rows of
// weights at once (bfloat16, 2048 x 2048, two Xeon threads, GB/s: K = 2 21.8 and 17.0 for 1 row, 20.2 and 18.3 for 4, 14.7 and
// 17.2 for 8; K = 4 22.4 and 13.5, 18.1 and 14.0, 13.0 and 13.2).
constexpr int64_t kUntiledRows = 4;

// Rows of a segment from which torch's product is faster. GFLOP/s of torch's product and the own one, float32, K = 2,
// N = D = 2048, two Xeon threads with AVX-512, best of alternating processes; torch's with one plain weight 375 to 400:
//   segments x rows    forward     gradient of x    weight gradient
//   32 x 32            193  237    193  195         149  230
//   8 x 128            259  320    268  274         261  276
//   4 x 256            276  341    268  304         305  293
//   1 x 512            315  338    326  330         343  314
//   1 x 1024           350  339    354  330
// With AVX2 there 8 x 128: 160 186, 155 157, 123 to 155 134 to 143.
constexpr int64_t kForwardRows = 768, kBackwardRows = 512, kGradientRows = 200;

}  // namespace

Plan plan_rows(const int32_t* row_map, int64_t M, int64_t S) {
  Plan plan;
  if (M > 0 && S == 1 && std::all_of(row_map, row_map + M, [](int32_t s) { return s == 0; })) {
    plan.segments.push_back({0, M, 0});
    return plan;
  }
  std::vector<int64_t> rows_of(S, 0);
  int64_t runs = 0, distinct = 0;
  for (int64_t m = 0; m < M; m++) {
    const int32_t s = row_map[m];
    if (s < 0 || s >= S) {
      throw std::out_of_range("row_map[" + std::to_string(m) + "] is " + std::to_string(s) + ", outside [0, " +
                              std::to_string(S) + ") of the coefficients' rows");
    }
    runs += m == 0 || row_map[m - 1] != s;
    distinct += rows_of[s]++ == 0;
  }
  plan.segments.reserve(distinct);
  if (runs == distinct) {
    for (int64_t m = 0; m < M; m++) {
      if (m == 0 || row_map[m - 1] != row_map[m]) plan.segments.push_back({m, m, row_map[m]});
      plan.segments.back().end = m + 1;
    }
    return plan;
  }
  std::vector<int64_t> next(S);
  int64_t begin = 0;
  for (int64_t s = 0; s < S; s++) {
    next[s] = begin;
    if (rows_of[s] > 0) plan.segments.push_back({begin, begin + rows_of[s], static_cast<int32_t>(s)});
    begin += rows_of[s];
  }
  plan.order.resize(M);
  for (int64_t m = 0; m < M; m++) plan.order[next[row_map[m]]++] = static_cast<int32_t>(m);
  return plan;
}

Mixes::Mixes(const Plan& plan, const float* c_SK, int64_t K, bool has_base) {
  // Reserved at once: the lists point into these.
  copies_.reserve(plan.segments.size() * K);
  c_.reserve(plan.segments.size() * K);
  for (const Segment& segment : plan.segments) {
    const size_t begin = copies_.size();
    for (int64_t k = 0; k < K; k++) {
      const float c = c_SK[segment.weighting * K + k];
      if (c == 0.0f) continue;
      copies_.push_back(static_cast<int32_t>(k));
      c_.push_back(c);
    }
    const int64_t count = static_cast<int64_t>(copies_.size() - begin);
    mixes_.push_back({has_base, count, copies_.data() + begin, c_.data() + begin});
  }
  if (mixes_.size() == 1) {
    any_ = mixes_[0];
    return;
  }
  std::vector<bool> is_read(K, false);
  for (const int32_t k : copies_) is_read[k] = true;
  for (int64_t k = 0; k < K; k++) {
    if (is_read[k]) any_copies_.push_back(static_cast<int32_t>(k));
  }
  any_ = {has_base, static_cast<int64_t>(any_copies_.size()), any_copies_.data(), nullptr};
}

bool streams_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, bool own_kernel) {
  const double streams = static_cast<double>(num_streams), rows = static_cast<double>(M);
  const double mixed = num_segments * (streams * kMixStream + kPackPanel) + rows;
  return own_kernel ? streams * rows * kOwnRow <= mixed : streams * (rows + kPackPanel) <= mixed;
}

bool tiles_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, int64_t num_products) {
  if (M <= kUntiledRows) return false;
  const double mixed = num_segments * (num_streams * kMixStream + kPackPanel) + M;
  return num_products * M * kTileRow <= mixed;
}

bool tile_mixes_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, int64_t num_parts,
                            int64_t num_products) {
  if (M <= kUntiledRows) return false;
  const double streams = static_cast<double>(num_streams);
  const double rows = static_cast<double>(M + kTilePadding * num_segments) * num_parts * kTileMixRow;
  const double tiles = rows + kTileBase + num_segments * streams * kTileCopy;
  const double mixed = num_segments * (streams * kMixStream + kPackPanel) + M;
  const double by_stream = num_products > 0 ? num_products * M * kTileRow : streams * (M + kPackPanel);
  return tiles < std::min(mixed, by_stream);
}

bool forward_is_fused(int64_t M, int64_t num_segments) { return M < kForwardRows * num_segments; }

bool backward_x_is_fused(int64_t M, int64_t num_segments) { return M < kBackwardRows * num_segments; }

bool gradient_is_fused(int64_t M, int64_t num_segments) { return M < kGradientRows * num_segments; }

bool copies_are_cheaper(int64_t M, int64_t num_segments, int64_t K) {
  return M < (kSpreadRows + 2 * K) * num_segments;
}

}  // namespace clp
