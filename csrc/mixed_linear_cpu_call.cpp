// The call of mixed_linear's forward on the CPU: arguments of any rank, checked, and a y of x's rank.
//
// It runs for every conditioned layer of every decoded token, so it costs microseconds or it shows: no views, no call
// of an operator by its name, and what does not fit raises without saying which argument, which Python then finds.
#include <algorithm>
#include <vector>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.dim() == static_cast<int64_t>(sizes.size()) &&
         std::equal(sizes.begin(), sizes.end(), tensor.sizes().data());
}

// Whether the leading sizes of `tensor` are the first `count` of x's.
bool leads_as(const Tensor& tensor, const Tensor& x, int64_t count) {
  return count < x.dim() && std::equal(x.sizes().data(), x.sizes().data() + count, tensor.sizes().data());
}

bool fits(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
          const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
          const std::optional<Tensor>& bias_deltas) {
  if (x.dim() < 1 || deltas.dim() != 3 || c.dim() < 1) return false;
  const int64_t N = deltas.size(0), K = deltas.size(1), D = deltas.size(2);
  if (K < 1 || x.size(x.dim() - 1) != D || c.size(c.dim() - 1) != K) return false;
  if (row_map) {
    if (c.dim() != 2 || row_map->dim() != x.dim() - 1 || !leads_as(*row_map, x, row_map->dim())) return false;
  } else if (!leads_as(c, x, c.dim() - 1)) {
    return false;
  }
  return (!base || has_sizes(*base, {N, D})) && (!bias || has_sizes(*bias, {N})) &&
         (!bias_deltas || has_sizes(*bias_deltas, {N, K}));
}

// The weighting of each of M rows where each of the S coefficient rows serves M / S rows in turn.
Tensor row_map_of_prefix(int64_t M, int64_t S) {
  const Tensor row_map = empty_tensor({M}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(row_map.mutable_data_ptr());
  for (int64_t s = 0; s < S; s++) out = std::fill_n(out, M / S, static_cast<int32_t>(s));
  return row_map;
}

}  // namespace

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

Tensor mixed_linear_cpu_call(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                             const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& bias_deltas, bool batch_invariant) {
  STD_TORCH_CHECK(fits(x, base, deltas, c, row_map, bias, bias_deltas), "mixed_linear (cpp): the arguments do not fit");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  int64_t M = 1;
  for (size_t i = 0; i + 1 < sizes.size(); i++) M *= sizes[i];
  sizes.back() = deltas.size(0);
  const Tensor y = empty_tensor(sizes, x.scalar_type());
  const Tensor map = row_map ? as_contiguous(*row_map) : row_map_of_prefix(M, c.numel() / deltas.size(1));
  mixed_linear_cpu_fwd(as_contiguous(x), base, deltas, as_contiguous(c), map, bias, bias_deltas, batch_invariant,
                       y);
  return y;
}

}  // namespace clp
