// low_rank_linear on the CPU: the operators, and the products that they are made of.
#pragma once

#include "low_rank_linear_cpu.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

// rows [M, length] @ weight^T, weight [columns, length]; or, with `by_input`, rows @ weight, weight [length, columns].
struct RowProduct {
  const Tensor* rows;
  const Tensor* weight;  // null: no term
};

// out = first + second + bias, in float32 before it is rounded to out's dtype. Where any tensor is not float32, tiles
// of float32 copies go to torch's product: 4 MiB a thread, whatever the sizes.
void sum_of_products(Tensor& out, const RowProduct& first, const RowProduct& second, const Tensor* bias,
                     bool by_input);

// out = a^T b, a [M, A], b [M, B], summed in float32.
void product_over_rows(Tensor& out, const Tensor& a, const Tensor& b);

Tensor as_float(const Tensor& tensor);

// Returns y [M, N] and, where keep_shrink, x @ down^T [M, R] in float32 (else an empty tensor).
std::tuple<Tensor, Tensor> low_rank_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base,
                                                   const Tensor& down, const Tensor& up, const Tensor& gates,
                                                   const Tensor& row_map, const std::optional<Tensor>& bias,
                                                   bool keep_shrink);

// Returns the gradients of x, base, down, up and gates; an empty tensor for one that is not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_cpu_backward(
    const Tensor& dy, const Tensor& shrink, const Tensor& x, const std::optional<Tensor>& base, const Tensor& down,
    const Tensor& up, const Tensor& gates, const Tensor& row_map, bool needs_x, bool needs_base, bool needs_down,
    bool needs_up, bool needs_gates);

}  // namespace clp
