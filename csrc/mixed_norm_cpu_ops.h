// The CPU operators of mixed_norm, as registered.
#pragma once

#include "mixed_rows_cpu.h"

namespace clp {

// y [M, D] in x's dtype.
Tensor mixed_norm_cpu_fwd(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_deltas,
                          const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& bias_deltas, double eps, bool is_centered, double offset,
                          bool cast_before_scale);

// The gradients of x [M, D] in its dtype, and in float32 of weight [D], weight_deltas [D, K], bias [D], bias_deltas
// [D, K] and coefficients [S, K]; an empty tensor for one that is not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_norm_cpu_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_deltas,
    const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias_deltas, double eps, bool is_centered,
    double offset, bool cast_before_scale, bool needs_x, bool needs_weight, bool needs_weight_deltas, bool needs_bias,
    bool needs_bias_deltas, bool needs_coefficients);

// RMSNorm of x [..., D], contiguous, in its dtype, without copies and as LlamaRMSNorm rounds; row_map [...] is not read
// for its values.
Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, const Tensor& row_map, double eps);

}  // namespace clp
