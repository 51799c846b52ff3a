// low_rank_linear on the CPU: y = x base^T + ((x down^T) * gates) up^T + bias, and its gradients.
//
// Few rows are bound by reading the weights: a kernel of our own reads each once (and 16-bit ones as they are). Many
// rows are torch's GEMM, which adds the expand into y: no second [M, N] tensor.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "low_rank_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;

// Rows up to which the weights are streamed.
constexpr int64_t kStreamedRows = 16;

const LowRankKernels& low_rank_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::portable:
      return low_rank_kernels_portable;
    case Isa::avx2:
      return low_rank_kernels_avx2;
    case Isa::avx512:
    case Isa::avx512_bf16:
    case Isa::amx_bf16:
      return low_rank_kernels_avx512;
  }
#endif
  return low_rank_kernels_portable;
}

// A tensor of the wanted sizes, contiguous, in one of the dtypes that the kernels take.
Tensor checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t dim = 0; fits && dim < tensor.dim(); dim++) fits = tensor.size(dim) == sizes.begin()[dim];
  STD_TORCH_CHECK(fits, "low_rank_linear (cpp): ", name,
                  " does not have the sizes that fit down and up, or is not on the CPU");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "low_rank_linear (cpp): ", name, " must be float32, bfloat16 or float16; the reference takes others");
  return as_contiguous(tensor);
}

// The checked gates [S, R] and row map [M].
class Gates {
 public:
  Gates(const Tensor& gates, const Tensor& row_map, int64_t M, int64_t R)
      : R(R), gates_(as_contiguous(gates)), row_map_(as_contiguous(row_map)) {
    STD_TORCH_CHECK(gates_.dim() == 2 && gates_.size(1) == R && gates_.scalar_type() == ScalarType::Float,
                    "low_rank_linear (cpp): gates must be float32 [S, ", R, "]");
    STD_TORCH_CHECK(row_map_.numel() == M && row_map_.scalar_type() == ScalarType::Int,
                    "low_rank_linear (cpp): row_map must be int32 [", M, "]");
    S = gates_.size(0);
    map_ = static_cast<const int32_t*>(row_map_.const_data_ptr());
    for (int64_t m = 0; m < M; m++) {
      if (map_[m] < 0 || map_[m] >= S) {
        throw std::out_of_range("row_map[" + std::to_string(m) + "] is " + std::to_string(map_[m]) + ", outside [0, " +
                                std::to_string(S) + ") of the gates' rows");
      }
    }
  }

  // out[m] = rows[m] * gates[row_map[m]]; out may be rows.
  void apply(const Tensor& rows, Tensor& out) const {
    const float* from = static_cast<const float*>(rows.const_data_ptr());
    float* to = static_cast<float*>(out.mutable_data_ptr());
    const float* gates = static_cast<const float*>(gates_.const_data_ptr());
    parallel(rows.size(0), R, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) {
        const float* gate = gates + map_[m] * R;
        for (int64_t r = 0; r < R; r++) to[m * R + r] = from[m * R + r] * gate[r];
      }
    });
  }

  // d_gates[s] = the sum of d_rows[m] * rows[m] over the rows m of weighting s, in float64 and in the rows' order.
  Tensor gradient(const Tensor& d_rows, const Tensor& rows) const {
    Tensor sums = torch::stable::new_zeros(gates_, {S, R}, ScalarType::Double);
    double* const first = static_cast<double*>(sums.mutable_data_ptr());
    const float* left = static_cast<const float*>(d_rows.const_data_ptr());
    const float* right = static_cast<const float*>(rows.const_data_ptr());
    for (int64_t m = 0; m < rows.size(0); m++) {
      double* sum = first + map_[m] * R;
      for (int64_t r = 0; r < R; r++) sum[r] += static_cast<double>(left[m * R + r]) * right[m * R + r];
    }
    return torch::stable::to(sums, ScalarType::Float);
  }

  const int64_t R;
  int64_t S;

 private:
  Tensor gates_, row_map_;
  const int32_t* map_;
};

// sums[:, begin:end] += x @ weight[begin:end]^T
void stream(const Tensor& x, const Tensor& weight, int64_t begin, int64_t end, float* sums) {
  const LowRankKernels& kernels = low_rank_kernels();
  const float* rows = static_cast<const float*>(x.const_data_ptr());
  const int64_t M = x.size(0), length = x.size(1), N = weight.size(0);
  const void* values = weight.const_data_ptr();
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return kernels.add_f32(rows, M, length, static_cast<const float*>(values), begin, end, sums, N);
    case ScalarType::BFloat16:
      return kernels.add_bf16(rows, M, length, static_cast<const Bf16*>(values), begin, end, sums, N);
    default:
      return kernels.add_f16(rows, M, length, static_cast<const Half*>(values), begin, end, sums, N);
  }
}

// out [M, N] = first + second + bias as sum_of_products, for few rows.
void stream_products(Tensor& out, const RowProduct& first, const RowProduct& second, const Tensor* bias) {
  const int64_t M = out.size(0), N = out.size(1);
  const bool wide = out.scalar_type() == ScalarType::Float;
  Tensor result = wide ? out : new_empty(out, {M, N}, ScalarType::Float);
  const Tensor bias_floats = bias ? as_float(*bias) : Tensor();
  const float* bias_values = bias ? static_cast<const float*>(bias_floats.const_data_ptr()) : nullptr;
  const Tensor first_rows = first.weight ? as_float(*first.rows) : Tensor();
  const Tensor second_rows = second.weight ? as_float(*second.rows) : Tensor();
  float* sums = static_cast<float*>(result.mutable_data_ptr());
  const int64_t work = M * ((first.weight ? first_rows.size(1) : 0) + (second.weight ? second_rows.size(1) : 0));
  parallel(N, work, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m++) {
      for (int64_t n = begin; n < end; n++) sums[m * N + n] = bias_values ? bias_values[n] : 0.0f;
    }
    if (first.weight) stream(first_rows, *first.weight, begin, end, sums);
    if (second.weight) stream(second_rows, *second.weight, begin, end, sums);
  });
  if (!wide) torch::stable::copy_(out, result);
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base,
                                                   const Tensor& down, const Tensor& up, const Tensor& gates,
                                                   const Tensor& row_map, const std::optional<Tensor>& bias,
                                                   bool keep_shrink) {
  const int64_t M = x.size(0), D = x.size(1), N = up.size(0), R = up.size(1);
  const Gates gate(gates, row_map, M, R);
  const Tensor rows = checked(x, "x", {M, D});
  const Tensor down_weight = checked(down, "down", {R, D}), up_weight = checked(up, "up", {N, R});
  const Tensor base_weight = base ? checked(*base, "base", {N, D}) : Tensor();
  const Tensor bias_values = bias ? checked(*bias, "bias", {N}) : Tensor();
  Tensor y = new_empty(rows, {M, N}), shrink = new_empty(rows, {M, R}, ScalarType::Float);
  Tensor gated = keep_shrink ? new_empty(shrink, {M, R}) : shrink;
  const RowProduct none{nullptr, nullptr}, base_term{&rows, base ? &base_weight : nullptr};
  const RowProduct shrink_term{&rows, &down_weight}, expand_term{&gated, &up_weight};
  const auto add = [&](Tensor& out, const RowProduct& first, const RowProduct& second, const Tensor* bias_term) {
    if (M <= kStreamedRows) {
      stream_products(out, first, second, bias_term);
    } else {
      sum_of_products(out, first, second, bias_term, false);
    }
  };
  add(shrink, shrink_term, none, nullptr);
  gate.apply(shrink, gated);
  add(y, base_term, expand_term, bias ? &bias_values : nullptr);
  return {y, keep_shrink ? shrink : new_empty(shrink, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_cpu_backward(
    const Tensor& dy, const Tensor& shrink, const Tensor& x, const std::optional<Tensor>& base, const Tensor& down,
    const Tensor& up, const Tensor& gates, const Tensor& row_map, bool needs_x, bool needs_base, bool needs_down,
    bool needs_up, bool needs_gates) {
  const int64_t M = x.size(0), D = x.size(1), N = up.size(0), R = up.size(1);
  const Gates gate(gates, row_map, M, R);
  const Tensor dy_rows = checked(dy, "dy", {M, N}), x_rows = checked(x, "x", {M, D});
  const Tensor h = checked(shrink, "shrink", {M, R});
  STD_TORCH_CHECK(h.scalar_type() == ScalarType::Float, "low_rank_linear (cpp): shrink must be float32");
  const Tensor down_weight = checked(down, "down", {R, D}), up_weight = checked(up, "up", {N, R});
  const Tensor base_weight = base ? checked(*base, "base", {N, D}) : Tensor();
  const RowProduct none{nullptr, nullptr};
  // Empty where it is not needed.
  const auto gradient = [](bool needed, const Tensor& like, int64_t rows, int64_t columns) {
    return needed ? new_empty(like, {rows, columns}) : new_empty(like, {0});
  };
  Tensor dx = gradient(needs_x, x_rows, M, D), d_down = gradient(needs_down, down_weight, R, D);
  Tensor d_up = gradient(needs_up, up_weight, N, R), d_base = gradient(needs_base, base ? base_weight : x_rows, N, D);
  Tensor d_gates = new_empty(h, {0}), ranks = new_empty(h, {M, R});
  if (needs_up) {
    gate.apply(h, ranks);
    product_over_rows(d_up, dy_rows, ranks);
  }
  if (needs_x || needs_down || needs_gates) sum_of_products(ranks, {&dy_rows, &up_weight}, none, nullptr, true);
  if (needs_gates) d_gates = gate.gradient(ranks, h);
  if (needs_x || needs_down) gate.apply(ranks, ranks);
  if (needs_down) product_over_rows(d_down, ranks, x_rows);
  if (needs_x) {
    sum_of_products(dx, {&dy_rows, base ? &base_weight : nullptr}, {&ranks, &down_weight}, nullptr, true);
  }
  if (needs_base) product_over_rows(d_base, dy_rows, x_rows);
  return {dx, d_base, d_down, d_up, d_gates};
}

}  // namespace clp
