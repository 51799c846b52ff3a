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

// What a call's terms are made of, checked and contiguous: x [..., D] of M rows, base [N, D] and bias [N], or null.
struct LowRankArgs {
  const Tensor& x;
  const Tensor *base, *bias;
  const Tensor &down, &up;   // [R, D], [N, R]
  int64_t M, D, N, R;
};

// The gates [S, R] and row map [M] of a call.
class Gates {
 public:
  Gates(const Tensor& gates, const Tensor& row_map, int64_t M, int64_t R);

  const float* of_row(int64_t m) const { return gates_ + row_map_[m] * R; }
  // out[m] = rows[m] * gates[row_map[m]], [M, R]; out may be rows.
  void apply(const float* rows, float* out) const;
  // d_gates[s] = the sum of d_rows[m] * rows[m] over the rows m of weighting s, in float64 and in the rows' order.
  Tensor gradient(const float* d_rows, const float* rows) const;

  const int64_t M, R;
  int64_t S;

 private:
  Tensor gates_tensor_, row_map_tensor_;
  const float* gates_;
  const int32_t* row_map_;
};

struct TileKernels;

// Fills y [M, N], bfloat16 as x, and shrink [M, R] with x @ down^T.
void run_low_rank_tiles(const TileKernels& kernels, const LowRankArgs& args, const Gates& gates, Tensor& y,
                        float* shrink);

// `tensor`, contiguous, as a matrix.
Tensor matrix_of(const Tensor& tensor, int64_t rows, int64_t columns);

// Checks that the arguments fit: gates [S, R] with a row map of x's leading sizes, or [..., R] whose leading sizes are
// the first of x's. Returns y [..., N] and, where keep_shrink, x @ down^T [M, R] in float32 (else an empty tensor).
std::tuple<Tensor, Tensor> low_rank_linear_cpu_call(const Tensor& x, const std::optional<Tensor>& base,
                                                    const Tensor& down, const Tensor& up, const Tensor& gates,
                                                    const std::optional<Tensor>& row_map,
                                                    const std::optional<Tensor>& bias, bool keep_shrink);

// Returns the gradients of x, base, down, up and gates; an empty tensor for one that is not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_cpu_backward(
    const Tensor& dy, const Tensor& shrink, const Tensor& x, const std::optional<Tensor>& base, const Tensor& down,
    const Tensor& up, const Tensor& gates, const Tensor& row_map, bool needs_x, bool needs_base, bool needs_down,
    bool needs_up, bool needs_gates);

}  // namespace clp
