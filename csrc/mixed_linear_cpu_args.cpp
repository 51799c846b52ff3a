#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;

Tensor checked(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "mixed_linear (cpp): ", name, " must be on the CPU");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace

FloatBuffer::FloatBuffer(int64_t size) {
  const size_t bytes = static_cast<size_t>((std::max<int64_t>(size, 1) * 4 + 63) / 64 * 64);
  float* data = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (data == nullptr) throw std::bad_alloc();
  data_.reset(data);
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "mixed_linear (cpp): ", name,
                  " must be float32 or bfloat16; the reference back-end takes others");
  return type == ScalarType::Float ? Dtype::f32 : Dtype::bf16;
}

Tensor contiguous_rows(const Tensor& rows, const char* name, int64_t M, int64_t width) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == M && rows.size(1) == width, "mixed_linear (cpp): ", name,
                  " must be [", M, ", ", width, "]");
  return checked(rows, name);
}

void copy_to_float(const void* values, Dtype dtype, int64_t offset, int64_t size, float* out) {
  if (dtype == Dtype::f32) {
    std::copy_n(static_cast<const float*>(values) + offset, size, out);
    return;
  }
  const Bf16* in = static_cast<const Bf16*>(values) + offset;
  for (int64_t i = 0; i < size; i++) {
    const uint32_t bits = static_cast<uint32_t>(in[i].bits) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

FloatBuffer to_floats(const std::optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor) return FloatBuffer();
  const Tensor values = checked(*tensor, name);
  STD_TORCH_CHECK(values.numel() == size, "mixed_linear (cpp): ", name, " must hold ", size, " values, got ",
                  values.numel());
  FloatBuffer floats(size);
  copy_to_float(values.const_data_ptr(), dtype_of(values, name), 0, size, floats.get());
  return floats;
}

MixedLinearArgs::MixedLinearArgs(const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                                 const Tensor& row_map)
    : deltas_(checked(deltas, "deltas")), c_(checked(c, "coefficients")), row_map_(checked(row_map, "row_map")) {
  STD_TORCH_CHECK(deltas_.dim() == 3, "mixed_linear (cpp): deltas must be [N, K, D]");
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
  STD_TORCH_CHECK(c_.dim() == 2 && c_.size(1) == weights.K && c_.scalar_type() == ScalarType::Float,
                  "mixed_linear (cpp): coefficients must be float32 [S, ", weights.K, "]");
  STD_TORCH_CHECK(row_map_.dim() == 1 && row_map_.scalar_type() == ScalarType::Int,
                  "mixed_linear (cpp): row_map must be int32 [M]");
  S = c_.size(0);
  rows = {row_map_.size(0), nullptr, static_cast<const int32_t*>(row_map_.const_data_ptr()),
          static_cast<const float*>(c_.const_data_ptr()), nullptr, 0};
}

Rows MixedLinearArgs::rows_with(const Plan& plan) const {
  Rows planned = rows;
  planned.order = plan.order.empty() ? nullptr : plan.order.data();
  planned.segments = plan.segments.data();
  planned.num_segments = static_cast<int64_t>(plan.segments.size());
  return planned;
}

}  // namespace clp
