// mixed_qkv on the CPU: the kernels of mixed_norm and mixed_linear, one after the other within one call, and a kernel of
// its own that rotates. What is saved beside a decode step's layer by layer calls is those calls.
#include "mixed_qkv_cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "mixed_norm_cpu_ops.h"
#include "mixed_qkv_cpu_ops.h"

namespace clp {

namespace {

const RotaryKernels& rotary_kernels_in_use() {
#if defined(__x86_64__)
  return in_use(rotary_kernels_portable, rotary_kernels_avx2, rotary_kernels_avx512);
#else
  return rotary_kernels_portable;
#endif
}

struct Projection {
  const Tensor &base, &deltas;
  const std::optional<Tensor>&bias, &bias_deltas;

  bool fits(int64_t D, int64_t K, int64_t head_dim) const {
    if (deltas.dim() != 3 || deltas.size(1) != K || deltas.size(2) != D || base.dim() != 2) return false;
    const int64_t N = deltas.size(0);
    const bool has_biases = (!bias || (bias->dim() == 1 && bias->size(0) == N)) &&
                            (!bias_deltas || (bias_deltas->dim() == 2 && bias_deltas->numel() == N * K));
    return base.size(0) == N && base.size(1) == D && N % head_dim == 0 && has_biases;
  }
};

// Whether `table` [..., head_dim] has one row for each of x's, or one for each of the last dimensions of x's rows.
bool is_table(const Tensor& table, const Tensor& x, int64_t head_dim) {
  int64_t i = table.dim(), j = x.dim();
  if (i < 1 || i > j || table.size(i - 1) != head_dim) return false;
  for (i -= 1, j -= 1; i > 0 && table.size(i - 1) == x.size(j - 1); i--, j--) continue;
  return std::all_of(table.sizes().data(), table.sizes().data() + i, [](int64_t size) { return size == 1; });
}

bool has_width(const std::optional<Tensor>& norm, int64_t head_dim) {
  return !norm || (norm->dim() == 1 && norm->size(0) == head_dim);
}

void rotate_heads(const Tensor& heads, int64_t M, const Tensor& cos, const Tensor& sin,
                  const std::optional<Tensor>& norm, int64_t head_dim, double eps) {
  const std::vector<float> weight = to_floats(norm, "q_norm or k_norm", head_dim);
  const int64_t H = M ? heads.numel() / (M * head_dim) : 0;
  const RotaryJob job{cos.const_data_ptr(), sin.const_data_ptr(), dtype_of(cos, "cos"),
                      std::max<int64_t>(cos.numel() / head_dim, 1), H, head_dim,
                      norm ? weight.data() : nullptr, static_cast<float>(eps),
                      heads.mutable_data_ptr(), dtype_of(heads, "x")};
  const RotaryKernels& kernels = rotary_kernels_in_use();
  parallel_rows(M, H * head_dim, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * head_dim);
    kernels.rotate(job, begin, end, scratch.data());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mixed_qkv_cpu_fwd(
    const Tensor& x, const Tensor& norm_weight, const Tensor& q_base, const Tensor& q_deltas,
    const std::optional<Tensor>& q_bias, const std::optional<Tensor>& q_bias_deltas, const Tensor& k_base,
    const Tensor& k_deltas, const std::optional<Tensor>& k_bias, const std::optional<Tensor>& k_bias_deltas,
    const Tensor& v_base, const Tensor& v_deltas, const std::optional<Tensor>& v_bias,
    const std::optional<Tensor>& v_bias_deltas, const Tensor& c, const Tensor& row_map, const Tensor& cos,
    const Tensor& sin, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
    bool batch_invariant) {
  const Projection projections[] = {{q_base, q_deltas, q_bias, q_bias_deltas},
                                    {k_base, k_deltas, k_bias, k_bias_deltas},
                                    {v_base, v_deltas, v_bias, v_bias_deltas}};
  const int64_t head_dim = cos.dim() ? cos.size(cos.dim() - 1) : 0;
  bool fits = x.dim() >= 1 && c.dim() == 2 && head_dim >= 2 && head_dim % 2 == 0 && norm_weight.dim() == 1 &&
              row_map.dim() == x.dim() - 1 &&
              std::equal(row_map.sizes().begin(), row_map.sizes().end(), x.sizes().begin());
  const int64_t D = fits ? x.size(x.dim() - 1) : 0, K = fits ? c.size(1) : 0;
  fits = fits && D > 0 && norm_weight.size(0) == D && is_table(cos, x, head_dim) && is_table(sin, x, head_dim) &&
         cos.numel() == sin.numel() && cos.scalar_type() == sin.scalar_type() && has_width(q_norm, head_dim) &&
         has_width(k_norm, head_dim);
  for (const Projection& projection : projections) fits = fits && projection.fits(D, K, head_dim);
  STD_TORCH_CHECK(fits, "mixed_qkv (cpp): the arguments do not fit");
  const Tensor map = as_contiguous(row_map), coefficients = as_contiguous(c);
  const Tensor normed = rms_norm_cpu(as_contiguous(x), norm_weight, map, eps);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = 0;
  sizes.push_back(head_dim);
  std::vector<Tensor> heads;
  for (const Projection& p : projections) {
    sizes[sizes.size() - 2] = p.deltas.size(0) / head_dim;
    heads.push_back(empty_tensor(sizes, x.scalar_type()));
    mixed_linear_cpu_fwd(normed, p.base, p.deltas, coefficients, map, p.bias, p.bias_deltas, batch_invariant, true,
                         heads.back());
  }
  const Tensor cos_rows = as_contiguous(cos), sin_rows = as_contiguous(sin);
  rotate_heads(heads[0], map.numel(), cos_rows, sin_rows, q_norm, head_dim, eps);
  rotate_heads(heads[1], map.numel(), cos_rows, sin_rows, k_norm, head_dim, eps);
  return {heads[0], heads[1], heads[2]};
}

}  // namespace clp
