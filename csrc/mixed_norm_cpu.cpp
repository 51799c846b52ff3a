// mixed_norm on the CPU: checks, parameters to float32, and the threads that run the kernels.
#include "mixed_norm_cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "mixed_norm_cpu_ops.h"

namespace clp {

namespace {

// Blocks of rows in a backward: sums for each are kept until the end, so that their number bounds the memory.
constexpr int64_t kMaxBlocks = 32;

const NormKernels& norm_kernels_in_use() {
#if defined(__x86_64__)
  return in_use(norm_kernels_portable, norm_kernels_avx2, norm_kernels_avx512);
#else
  return norm_kernels_portable;
#endif
}

// [D, K] as [K, D] floats.
std::vector<float> copies_apart(const Tensor& deltas, const char* name, int64_t D, int64_t K) {
  const std::vector<float> floats = to_floats(deltas, name, D * K);
  if (K == 1) return floats;
  std::vector<float> apart(K * D);
  for (int64_t k = 0; k < K; k++) {
    for (int64_t d = 0; d < D; d++) apart[k * D + d] = floats[d * K + k];
  }
  return apart;
}

// The parameters as the kernels read them; owns their float32 copies, (K + 1) * D values each.
class StagedParameters {
 public:
  StagedParameters(const std::optional<Tensor>& weight, const Tensor& weight_deltas, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& bias_deltas, double offset) {
    STD_TORCH_CHECK(weight_deltas.dim() == 2, "weight_deltas must be [D, K]");
    const int64_t D = weight_deltas.size(0), K = weight_deltas.size(1);
    weight_ = weight ? to_floats(*weight, "weight", D) : std::vector<float>(D);
    for (float& value : weight_) value += static_cast<float>(offset);
    weight_deltas_ = copies_apart(weight_deltas, "weight_deltas", D, K);
    if (bias || bias_deltas) bias_ = bias ? to_floats(*bias, "bias", D) : std::vector<float>(D);
    if (bias_deltas) bias_deltas_ = copies_apart(*bias_deltas, "bias_deltas", D, K);
    parameters = {weight_.data(), weight_deltas_.data(), bias_.empty() ? nullptr : bias_.data(),
                  bias_deltas_.empty() ? nullptr : bias_deltas_.data(), K, D};
  }

  NormParameters parameters;

 private:
  std::vector<float> weight_, weight_deltas_, bias_, bias_deltas_;
};

// The sums of all blocks, in the blocks' order, into those of the first.
void sum_blocks(float* sums, int64_t blocks, int64_t size) {
  for (int64_t b = 1; b < blocks; b++) {
    for (int64_t i = 0; i < size; i++) sums[i] += sums[b * size + i];
  }
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// [D] of sums [K + 1, D], float32.
Tensor first_stream(const Tensor& like, const float* sums, int64_t D) {
  Tensor out = torch::stable::new_empty(like, {D});
  std::copy_n(sums, D, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// [D, K] of sums [K + 1, D], float32.
Tensor other_streams(const Tensor& like, const float* sums, int64_t D, int64_t K) {
  Tensor out = torch::stable::new_empty(like, {D, K});
  float* values = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t d = 0; d < D; d++) {
    for (int64_t k = 0; k < K; k++) values[d * K + k] = sums[(k + 1) * D + d];
  }
  return out;
}

}  // namespace

Tensor mixed_norm_cpu_fwd(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_deltas,
                          const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& bias_deltas, double eps, bool is_centered, double offset,
                          bool cast_before_scale) {
  const StagedParameters staged(weight, weight_deltas, bias, bias_deltas, offset);
  const int64_t M = x.size(0), D = staged.parameters.D;
  const Tensor x_rows = contiguous_rows(x, "x", M, D);
  const RowCoefficients rows(c, row_map, M, staged.parameters.K);
  Tensor y = torch::stable::new_empty(x_rows, {M, D});
  const NormRows norm_rows{x_rows.const_data_ptr(),  dtype_of(x_rows, "x"), rows.row_map,      rows.c,
                           static_cast<float>(eps), is_centered,           cast_before_scale};
  const NormJob job{staged.parameters, norm_rows, y.mutable_data_ptr()};
  const NormKernels& kernels = norm_kernels_in_use();
  parallel_rows(M, D, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * D);
    kernels.forward(job, begin, end, scratch.data());
  });
  return y;
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, const Tensor& row_map, double eps) {
  const int64_t M = row_map.numel(), D = weight.numel();
  const std::vector<float> floats = to_floats(weight, "norm_weight", D);
  const Tensor y = empty_tensor({M, D}, x.scalar_type());
  const NormRows rows{x.const_data_ptr(), dtype_of(x, "x"), static_cast<const int32_t*>(row_map.const_data_ptr()),
                      nullptr, static_cast<float>(eps), false, true};
  const NormJob job{{floats.data(), nullptr, nullptr, nullptr, 0, D}, rows, y.mutable_data_ptr()};
  const NormKernels& kernels = norm_kernels_in_use();
  parallel_rows(M, D, [&](int64_t begin, int64_t end) { kernels.forward(job, begin, end, nullptr); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_norm_cpu_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_deltas,
    const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias_deltas, double eps, bool is_centered,
    double offset, bool cast_before_scale, bool needs_x, bool needs_weight, bool needs_weight_deltas, bool needs_bias,
    bool needs_bias_deltas, bool needs_coefficients) {
  const StagedParameters staged(weight, weight_deltas, std::nullopt, bias_deltas, offset);
  const int64_t M = x.size(0), D = staged.parameters.D, K = staged.parameters.K, size = (K + 1) * D;
  const Tensor x_rows = contiguous_rows(x, "x", M, D), dy_rows = contiguous_rows(dy, "dy", M, D);
  const RowCoefficients rows(c, row_map, M, K);
  const Dtype dtype = dtype_of(x_rows, "x");
  STD_TORCH_CHECK(dtype_of(dy_rows, "dy") == dtype, "dy must have x's dtype");
  Tensor dx = torch::stable::new_empty(x_rows, needs_x ? std::vector<int64_t>{M, D} : std::vector<int64_t>{0});
  const int64_t most_rows = ceil_div(M, kMaxBlocks);
  const int64_t block_rows = std::max(ceil_div(most_rows, kNormChunk), int64_t{1}) * kNormChunk;
  const int64_t blocks = std::max<int64_t>(ceil_div(M, block_rows), 1);
  const bool sums_weight = needs_weight || needs_weight_deltas, sums_bias = needs_bias || needs_bias_deltas;
  // Of torch's allocator, which counts them.
  const Tensor weight_memory = torch::stable::new_empty(c, {sums_weight ? blocks * size : 0});
  const Tensor bias_memory = torch::stable::new_empty(c, {sums_bias ? blocks * size : 0});
  float* weight_sums = static_cast<float*>(weight_memory.mutable_data_ptr());
  float* bias_sums = static_cast<float*>(bias_memory.mutable_data_ptr());
  std::vector<double> terms(needs_coefficients ? M * K : 0, 0.0);
  const NormRows norm_rows{x_rows.const_data_ptr(),  dtype,       rows.row_map,      rows.c,
                           static_cast<float>(eps), is_centered, cast_before_scale};
  const NormGradJob job{staged.parameters,
                        norm_rows,
                        M,
                        block_rows,
                        dy_rows.const_data_ptr(),
                        needs_x ? dx.mutable_data_ptr() : nullptr,
                        sums_weight ? weight_sums : nullptr,
                        sums_bias ? bias_sums : nullptr,
                        needs_coefficients ? terms.data() : nullptr};
  const NormKernels& kernels = norm_kernels_in_use();
  parallel_rows(blocks, block_rows * D, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch((2 * K + 5) * D);
    kernels.backward(job, begin, end, scratch.data());
  });
  if (sums_weight) sum_blocks(weight_sums, blocks, size);
  if (sums_bias) sum_blocks(bias_sums, blocks, size);
  return {dx,
          needs_weight ? first_stream(c, weight_sums, D) : nothing(c),
          needs_weight_deltas ? other_streams(c, weight_sums, D, K) : nothing(c),
          needs_bias ? first_stream(c, bias_sums, D) : nothing(c),
          needs_bias_deltas ? other_streams(c, bias_sums, D, K) : nothing(c),
          needs_coefficients ? rows.gradient(terms.data()) : nothing(c)};
}

}  // namespace clp
