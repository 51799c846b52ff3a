// The CPU operators of mixed_embedding, as registered.
#pragma once

#include "mixed_rows_cpu.h"

namespace clp {

// y [M, D], of the base's dtype, or of the deltas' where base is none. Throws std::out_of_range for an id outside
// [0, V).
Tensor mixed_embedding_cpu_fwd(const Tensor& ids, const std::optional<Tensor>& base, const Tensor& deltas,
                               const Tensor& c, const Tensor& row_map);

// The gradients of base [V, D] (in dy's dtype), deltas [V, K, D] (in their dtype) and coefficients [S, K]; an empty
// tensor for one that is not needed. padding_idx: the id whose rows add nothing to base and deltas; -1 for none. Where
// main_grad is given, the deltas' gradient is added to it in float32, and the tensor returned for it is empty.
std::tuple<Tensor, Tensor, Tensor> mixed_embedding_cpu_backward(const Tensor& dy, const Tensor& ids,
                                                                const Tensor& deltas, const Tensor& c,
                                                                const Tensor& row_map, int64_t padding_idx,
                                                                bool needs_base, bool needs_deltas,
                                                                bool needs_coefficients,
                                                                const std::optional<Tensor>& main_grad);

}  // namespace clp
