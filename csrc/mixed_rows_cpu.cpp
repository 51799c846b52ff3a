#include "mixed_rows_cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

namespace clp {

using torch::headeronly::ScalarType;

RowCoefficients::RowCoefficients(const Tensor& coefficients, const Tensor& map, int64_t num_rows, int64_t copies)
    : M(num_rows), S(0), K(copies), c_(as_contiguous(coefficients)), row_map_(as_contiguous(map)) {
  STD_TORCH_CHECK(c_.dim() == 2 && c_.size(1) == K && c_.scalar_type() == ScalarType::Float,
                  "coefficients must be float32 [S, ", K, "]");
  STD_TORCH_CHECK(row_map_.dim() == 1 && row_map_.size(0) == M && row_map_.scalar_type() == ScalarType::Int,
                  "row_map must be int32 [", M, "]");
  S = c_.size(0);
  c = static_cast<const float*>(c_.const_data_ptr());
  row_map = static_cast<const int32_t*>(row_map_.const_data_ptr());
  for (int64_t m = 0; m < M; m++) {
    if (row_map[m] < 0 || row_map[m] >= S) {
      throw std::out_of_range("row_map[" + std::to_string(m) + "] is " + std::to_string(row_map[m]) +
                              ", outside [0, " + std::to_string(S) + ") of the coefficients' rows");
    }
  }
}

Tensor RowCoefficients::gradient(const double* terms) const {
  std::vector<double> sums(S * K, 0.0);
  for (int64_t m = 0; m < M; m++) {
    for (int64_t k = 0; k < K; k++) sums[row_map[m] * K + k] += terms[m * K + k];
  }
  Tensor d_c = torch::stable::new_empty(c_, {S, K});
  float* out = static_cast<float*>(d_c.mutable_data_ptr());
  for (int64_t i = 0; i < S * K; i++) out[i] = static_cast<float>(sums[i]);
  return d_c;
}

}  // namespace clp
