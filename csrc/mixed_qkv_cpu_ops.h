// The CPU operator of mixed_qkv, as registered.
#pragma once

#include "mixed_linear_cpu_ops.h"

namespace clp {

// Queries, keys and values [..., heads, head_dim] of x [..., D]: RMSNorm, three averaged products, and for queries and
// keys the norm of each head where it has a weight, then the rotation. Raises where the arguments do not fit, without
// saying which: see mixed_linear_cpu_call.
std::tuple<Tensor, Tensor, Tensor> mixed_qkv_cpu_fwd(
    const Tensor& x, const Tensor& norm_weight, const Tensor& q_base, const Tensor& q_deltas,
    const std::optional<Tensor>& q_bias, const std::optional<Tensor>& q_bias_deltas, const Tensor& k_base,
    const Tensor& k_deltas, const std::optional<Tensor>& k_bias, const std::optional<Tensor>& k_bias_deltas,
    const Tensor& v_base, const Tensor& v_deltas, const std::optional<Tensor>& v_bias,
    const std::optional<Tensor>& v_bias_deltas, const Tensor& c, const Tensor& row_map, const Tensor& cos,
    const Tensor& sin, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
    bool batch_invariant);

}  // namespace clp
