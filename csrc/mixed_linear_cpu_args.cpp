#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;

Tensor checked(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  return as_contiguous(tensor);
}

}  // namespace

Scratch::Scratch(int64_t size) {
  if (size == 0) return;
  tensor_ = empty_tensor({size}, ScalarType::Float);
  data_ = static_cast<float*>(tensor_->mutable_data_ptr());
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16; the reference back-end takes others");
  }
}

Tensor contiguous_rows(const Tensor& rows, const char* name, int64_t M, int64_t width) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == M && rows.size(1) == width, name,
                  " must be [", M, ", ", width, "]");
  return checked(rows, name);
}

std::vector<float> to_floats(const std::optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor) return {};
  const Tensor values = checked(*tensor, name);
  STD_TORCH_CHECK(values.numel() == size, name, " must hold ", size, " values, got ",
                  values.numel());
  std::vector<float> floats(size);
  kernels_in_use().widen(values.const_data_ptr(), dtype_of(values, name), 0, size, 1.0f, floats.data());
  return floats;
}

float* main_grad_floats(const Tensor& main_grad, int64_t N, int64_t K, int64_t D) {
  const bool has_sizes =
      main_grad.dim() == 3 && main_grad.size(0) == N && main_grad.size(1) == K && main_grad.size(2) == D;
  STD_TORCH_CHECK(has_sizes && main_grad.scalar_type() == ScalarType::Float && main_grad.is_contiguous() &&
                      main_grad.is_cpu(),
                  "main_grad must be float32 [", N, ", ", K, ", ", D, "], contiguous, on the CPU");
  return static_cast<float*>(main_grad.mutable_data_ptr());
}

MixedLinearArgs::MixedLinearArgs(const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                                 const std::optional<Tensor>& row_map, int64_t M)
    : M(M), deltas_(checked(deltas, "deltas")), c_(checked(c, "coefficients")) {
  STD_TORCH_CHECK(deltas_.dim() == 3 && deltas_.size(1) > 0, "mixed_linear (cpp): deltas must be [N, K, D], K > 0");
  weights = {nullptr, deltas_.const_data_ptr(), Dtype::f32, dtype_of(deltas_, "deltas"), deltas_.size(0),
             deltas_.size(1), deltas_.size(2)};
  weights.base_dtype = weights.deltas_dtype;
  if (base) {
    base_ = checked(*base, "base");
    STD_TORCH_CHECK(base_->dim() == 2 && base_->size(0) == weights.N && base_->size(1) == weights.D,
                    "mixed_linear (cpp): base must be [", weights.N, ", ", weights.D, "]");
    weights.base = base_->const_data_ptr();
    weights.base_dtype = dtype_of(*base_, "base");
  }
  STD_TORCH_CHECK(c_.scalar_type() == ScalarType::Float && c_.size(c_.dim() - 1) == weights.K,
                  "mixed_linear (cpp): coefficients must be float32 [..., ", weights.K, "]");
  S = c_.numel() / weights.K;
  this->c = static_cast<const float*>(c_.const_data_ptr());
  if (!row_map) {
    made_map_.resize(M);
    fill_row_map(c_, M, made_map_.data());
    this->row_map = made_map_.data();
    return;
  }
  row_map_ = checked(*row_map, "row_map");
  STD_TORCH_CHECK(row_map_->scalar_type() == ScalarType::Int, "mixed_linear (cpp): row_map must be int32");
  this->M = row_map_->numel();
  this->row_map = static_cast<const int32_t*>(row_map_->const_data_ptr());
}

}  // namespace clp
