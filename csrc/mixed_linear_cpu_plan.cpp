#include "mixed_linear_cpu_plan.h"

#include <stdexcept>
#include <string>

namespace clp {

namespace {

// Costs in units of one row through one packed panel (7.3 us for 576 x 576 float32 weights on one Zen 3 core with AVX2;
// measured there, K = 2: mixed panels 130 us for each weighting, concatenated ones 280 us in all, streamed rows 27 us each).
constexpr double kPanelRow = 1.0;
constexpr double kMixStream = 6.0;
constexpr double kPackStream = 13.0;
constexpr double kStreamRow = 1.2;

}  // namespace

Plan plan_rows(const int32_t* row_map, int64_t M, int64_t S) {
  Plan plan;
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

Path choose_path(int64_t M, int64_t num_segments, int64_t K, bool has_base, bool may_stream) {
  const double streams = static_cast<double>(K + (has_base ? 1 : 0));
  const double mixed = num_segments * streams * kMixStream + M * kPanelRow;
  const double concatenated = streams * kPackStream + M * streams * kPanelRow;
  const double stream = M * streams * kStreamRow;
  if (may_stream && stream <= mixed && stream <= concatenated) return Path::stream;
  return mixed <= concatenated ? Path::mixed_panels : Path::concatenated_panels;
}

}  // namespace clp
