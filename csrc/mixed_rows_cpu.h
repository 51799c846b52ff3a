// What the CPU operators that work row by row share: the coefficients of a call's rows, threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

// Runs body(begin, end) over [0, size) in torch's thread pool; on the calling thread alone where all of it, `size`
// items that each read or write `values` numbers, is not worth waking another: that costs a few microseconds.
template <typename Body>
void parallel_rows(int64_t size, int64_t values, const Body& body) {
  constexpr int64_t kGrain = 32768;
  const int64_t grain = kGrain / std::max<int64_t>(values, 1) + 1;
  if (size > grain && num_threads() > 1) {
    torch::stable::parallel_for(0, size, grain, body);
  } else if (size > 0) {
    body(int64_t{0}, size);
  }
}

// Of one operator's tables of kernels, that of the instruction set in use.
template <typename Kernels>
const Kernels& in_use(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  const Isa isa = current_isa();
  return isa == Isa::portable ? portable : isa == Isa::avx2 ? avx2 : avx512;
}

// The checked coefficients [S, K] and row map [M] of a call; keeps contiguous copies alive where they were needed.
class RowCoefficients {
 public:
  // Throws std::out_of_range for an entry of row_map outside [0, S).
  RowCoefficients(const Tensor& c, const Tensor& row_map, int64_t M, int64_t K);

  // [S, K]: terms [M, K] summed by weighting in float64, in the order of the rows.
  Tensor gradient(const double* terms) const;

  int64_t M, S, K;
  const float* c;
  const int32_t* row_map;

 private:
  Tensor c_, row_map_;
};

}  // namespace clp
