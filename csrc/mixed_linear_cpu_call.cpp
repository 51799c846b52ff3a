// The call of mixed_linear's forward on the CPU: arguments of any rank, checked, and a y of x's rank.
#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

bool fits(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
          const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
          const std::optional<Tensor>& bias_deltas) {
  if (deltas.dim() != 3) return false;
  const int64_t N = deltas.size(0), K = deltas.size(1), D = deltas.size(2);
  return K >= 1 && rows_fit(x, D, c, K, row_map) && (!base || has_sizes(*base, {N, D})) &&
         (!bias || has_sizes(*bias, {N})) && (!bias_deltas || has_sizes(*bias_deltas, {N, K}));
}

}  // namespace

Tensor mixed_linear_cpu_call(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                             const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& bias_deltas, bool batch_invariant, bool exact_delta) {
  STD_TORCH_CHECK(fits(x, base, deltas, c, row_map, bias, bias_deltas), "mixed_linear (cpp): the arguments do not fit");
  const Tensor y = empty_rows(x, deltas.size(0));
  mixed_linear_cpu_fwd(as_contiguous(x), base, deltas, as_contiguous(c), row_map, bias, bias_deltas, batch_invariant,
                       exact_delta, y);
  return y;
}

}  // namespace clp
