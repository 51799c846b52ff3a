#include "cpu_call.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace clp {

namespace {

using torch::headeronly::ScalarType;

// Whether the leading sizes of `tensor` are the first `count` of x's.
bool leads_as(const Tensor& tensor, const Tensor& x, int64_t count) {
  return count < x.dim() && std::equal(x.sizes().data(), x.sizes().data() + count, tensor.sizes().data());
}

}  // namespace

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.dim() == static_cast<int64_t>(sizes.size()) &&
         std::equal(sizes.begin(), sizes.end(), tensor.sizes().data());
}

bool rows_fit(const Tensor& x, int64_t D, const Tensor& c, int64_t width, const std::optional<Tensor>& row_map) {
  if (x.dim() < 1 || c.dim() < 1 || x.size(x.dim() - 1) != D || c.size(c.dim() - 1) != width) return false;
  if (!row_map) return leads_as(c, x, c.dim() - 1);
  return c.dim() == 2 && row_map->dim() == x.dim() - 1 && leads_as(*row_map, x, row_map->dim());
}

int64_t rows_of(const Tensor& x) {
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) M *= x.size(i);
  return M;
}

Tensor row_map_of(const std::optional<Tensor>& row_map, int64_t M, const Tensor& c) {
  if (row_map) return row_map->is_contiguous() ? *row_map : torch::stable::contiguous(*row_map);
  const Tensor made = empty_tensor({M}, ScalarType::Int);
  fill_row_map(c, M, static_cast<int32_t*>(made.mutable_data_ptr()));
  return made;
}

void fill_row_map(const Tensor& c, int64_t M, int32_t* out) {
  // Not c.numel() / width: gates of no rank have no numbers.
  int64_t S = 1;
  for (int64_t i = 0; i + 1 < c.dim(); i++) S *= c.size(i);
  for (int64_t s = 0; s < S; s++) out = std::fill_n(out, M / S, static_cast<int32_t>(s));
}

Tensor empty_rows(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return empty_tensor(sizes, x.scalar_type());
}

Tensor empty_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), type, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

}  // namespace clp
