// low_rank_linear on the CPU: y = x base^T + ((x down^T) * gates) up^T + bias, and its gradients.
//
// Few rows are bound by reading the weights: a kernel of our own reads each once (and 16-bit ones as they are). Many
// rows are torch's GEMM, which adds the expand into y: no second [M, N] tensor. bfloat16 rows on a processor that
// multiplies tiles are in low_rank_linear_cpu_tiles.cpp.
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

void check_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "low_rank_linear (cpp): ", name, " must be float32, bfloat16 or float16; the reference takes others");
}

// A tensor of the wanted sizes, contiguous, in one of the dtypes that the kernels take.
Tensor checked(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t dim = 0; fits && dim < tensor.dim(); dim++) fits = tensor.size(dim) == sizes.begin()[dim];
  STD_TORCH_CHECK(fits, "low_rank_linear (cpp): ", name,
                  " does not have the sizes that fit down and up, or is not on the CPU");
  check_dtype(tensor, name);
  return as_contiguous(tensor);
}

bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

Tensor as_bfloat16(const Tensor& tensor) {
  return is_bfloat16(tensor) ? tensor : torch::stable::to(tensor, ScalarType::BFloat16);
}

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

// out [M, columns] = first + second + bias as sum_of_products, for few rows.
void stream_products(Tensor& out, const RowProduct& first, const RowProduct& second, const Tensor* bias) {
  const int64_t M = out.size(0), columns = out.size(1);
  const bool wide = out.scalar_type() == ScalarType::Float;
  Tensor result = wide ? out : empty_tensor({M, columns}, ScalarType::Float);
  const Tensor bias_floats = bias ? as_float(*bias) : Tensor();
  const float* bias_values = bias ? static_cast<const float*>(bias_floats.const_data_ptr()) : nullptr;
  const Tensor first_rows = first.weight ? as_float(*first.rows) : Tensor();
  const Tensor second_rows = second.weight ? as_float(*second.rows) : Tensor();
  float* sums = static_cast<float*>(result.mutable_data_ptr());
  const int64_t work = M * ((first.weight ? first_rows.size(1) : 0) + (second.weight ? second_rows.size(1) : 0));
  parallel(columns, work, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m++) {
      for (int64_t n = begin; n < end; n++) sums[m * columns + n] = bias_values ? bias_values[n] : 0.0f;
    }
    if (first.weight) stream(first_rows, *first.weight, begin, end, sums);
    if (second.weight) stream(second_rows, *second.weight, begin, end, sums);
  });
  if (!wide) torch::stable::copy_(out, result);
}

void run_products(const LowRankArgs& args, const Gates& gates, Tensor& y, Tensor& shrink, bool keep_shrink) {
  const Tensor rows = matrix_of(args.x, args.M, args.D);
  Tensor out = matrix_of(y, args.M, args.N);
  const RowProduct none{nullptr, nullptr};
  const auto add = args.M <= kStreamedRows
                       ? stream_products
                       : [](Tensor& sum, const RowProduct& first, const RowProduct& second, const Tensor* bias) {
                           sum_of_products(sum, first, second, bias, false);
                         };
  add(shrink, {&rows, &args.down}, none, nullptr);
  Tensor gated = keep_shrink ? empty_tensor({args.M, args.R}, ScalarType::Float) : shrink;
  gates.apply(static_cast<const float*>(shrink.const_data_ptr()), static_cast<float*>(gated.mutable_data_ptr()));
  add(out, {&rows, args.base}, {&gated, &args.up}, args.bias);
}

bool fits(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& gates,
          const std::optional<Tensor>& row_map) {
  return down.dim() == 2 && up.dim() == 2 && up.size(1) == down.size(0) &&
         rows_fit(x, down.size(1), gates, down.size(0), row_map);
}

}  // namespace

Gates::Gates(const Tensor& gates, const Tensor& row_map, int64_t M, int64_t R)
    : M(M), R(R), gates_tensor_(as_contiguous(gates)), row_map_tensor_(as_contiguous(row_map)) {
  STD_TORCH_CHECK(gates_tensor_.dim() >= 1 && gates_tensor_.size(gates_tensor_.dim() - 1) == R &&
                      gates_tensor_.scalar_type() == ScalarType::Float && gates_tensor_.is_cpu(),
                  "low_rank_linear (cpp): gates must be float32 [..., ", R, "]");
  STD_TORCH_CHECK(row_map_tensor_.numel() == M && row_map_tensor_.scalar_type() == ScalarType::Int &&
                      row_map_tensor_.is_cpu(),
                  "low_rank_linear (cpp): row_map must be int32 of ", M, " rows");
  S = rows_of(gates_tensor_);
  gates_ = static_cast<const float*>(gates_tensor_.const_data_ptr());
  row_map_ = static_cast<const int32_t*>(row_map_tensor_.const_data_ptr());
  for (int64_t m = 0; m < M; m++) {
    if (row_map_[m] < 0 || row_map_[m] >= S) {
      throw std::out_of_range("row_map[" + std::to_string(m) + "] is " + std::to_string(row_map_[m]) +
                              ", outside [0, " + std::to_string(S) + ") of the gates' rows");
    }
  }
}

void Gates::apply(const float* rows, float* out) const {
  parallel(M, R, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const float* gate = of_row(m);
      for (int64_t r = 0; r < R; r++) out[m * R + r] = rows[m * R + r] * gate[r];
    }
  });
}

Tensor Gates::gradient(const float* d_rows, const float* rows) const {
  Tensor sums = torch::stable::new_zeros(gates_tensor_, {S, R}, ScalarType::Double);
  double* const first = static_cast<double*>(sums.mutable_data_ptr());
  for (int64_t m = 0; m < M; m++) {
    double* sum = first + row_map_[m] * R;
    for (int64_t r = 0; r < R; r++) sum[r] += static_cast<double>(d_rows[m * R + r]) * rows[m * R + r];
  }
  return torch::stable::to(sums, ScalarType::Float);
}

Tensor matrix_of(const Tensor& tensor, int64_t rows, int64_t columns) {
  if (tensor.dim() == 2) return tensor;
  return torch::stable::from_blob(const_cast<void*>(tensor.const_data_ptr()), {rows, columns}, {columns, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), tensor.scalar_type());
}

std::tuple<Tensor, Tensor> low_rank_linear_cpu_call(const Tensor& x, const std::optional<Tensor>& base,
                                                    const Tensor& down, const Tensor& up, const Tensor& gates,
                                                    const std::optional<Tensor>& row_map,
                                                    const std::optional<Tensor>& bias, bool keep_shrink) {
  STD_TORCH_CHECK(fits(x, down, up, gates, row_map), "low_rank_linear (cpp): the arguments do not fit");
  const int64_t M = rows_of(x), D = down.size(1), N = up.size(0), R = up.size(1);
  check_dtype(x, "x");
  const Tensor rows = as_contiguous(x);
  const Tensor down_weight = checked(down, "down", {R, D}), up_weight = checked(up, "up", {N, R});
  const Tensor base_weight = base ? checked(*base, "base", {N, D}) : Tensor();
  const Tensor bias_values = bias ? checked(*bias, "bias", {N}) : Tensor();
  const LowRankArgs args{rows, base ? &base_weight : nullptr, bias ? &bias_values : nullptr, down_weight, up_weight,
                         M,    D, N, R};
  const Gates gate(gates, row_map_of(row_map, M, gates), M, R);
  Tensor y = empty_rows(rows, N), shrink = empty_tensor({M, R}, ScalarType::Float);
  const TileKernels* tiles = x.scalar_type() == ScalarType::BFloat16 ? tile_kernels_in_use() : nullptr;
  if (tiles) {
    run_low_rank_tiles(*tiles, args, gate, y, static_cast<float*>(shrink.mutable_data_ptr()));
  } else {
    run_products(args, gate, y, shrink, keep_shrink);
  }
  return {y, keep_shrink ? shrink : empty_tensor({0}, ScalarType::Float)};
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
  const float* const shrunk = static_cast<const float*>(h.const_data_ptr());
  float* const d_ranks = static_cast<float*>(ranks.mutable_data_ptr());
  if (needs_up) {
    gate.apply(shrunk, d_ranks);
    product_over_rows(d_up, dy_rows, ranks);
  }
  if (needs_x || needs_down || needs_gates) sum_of_products(ranks, {&dy_rows, &up_weight}, none, nullptr, true);
  if (needs_gates) d_gates = gate.gradient(d_ranks, shrunk);
  if (needs_x || needs_down) gate.apply(d_ranks, d_ranks);
  if (needs_down) product_over_rows(d_down, ranks, x_rows);
  if (needs_x && is_bfloat16(dx) && is_bfloat16(dy_rows) && base && is_bfloat16(base_weight) &&
      M > kStreamedRows && tile_kernels_in_use()) {
    // torch's product on tiles adds to what dx holds in float32: the low-rank term alone is rounded before.
    gemm(dx, as_bfloat16(ranks), as_bfloat16(down_weight), false);
    gemm(dx, dy_rows, base_weight, true);
  } else if (needs_x) {
    sum_of_products(dx, {&dy_rows, base ? &base_weight : nullptr}, {&ranks, &down_weight}, nullptr, true);
  }
  if (needs_base) product_over_rows(d_base, dy_rows, x_rows);
  return {dx, d_base, d_down, d_up, d_gates};
}

}  // namespace clp
