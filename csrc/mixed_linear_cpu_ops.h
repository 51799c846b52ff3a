// What the CPU operators of mixed_linear share: tensors to plain pointers, buffers, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "mixed_linear_cpu_plan.h"

namespace clp {

using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Runs body(begin, end) over [0, size) in torch's thread pool, on the calling thread alone where size <= grain.
template <typename Body>
void parallel(int64_t size, int64_t grain, const Body& body) {
  if (size <= grain || num_threads() == 1) {
    if (size > 0) body(int64_t{0}, size);
    return;
  }
  torch::stable::parallel_for(0, size, grain, body);
}

// Floats on a cache line's boundary, not initialised.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  explicit FloatBuffer(int64_t size);
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

Dtype dtype_of(const Tensor& tensor, const char* name);

// `rows` as a contiguous tensor, checked to be [M, width] on the CPU.
Tensor contiguous_rows(const Tensor& rows, const char* name, int64_t M, int64_t width);

// values[0 .. size) of a float32 or bf16 array from `offset`, as float32.
void copy_to_float(const void* values, Dtype dtype, int64_t offset, int64_t size, float* out);

// A small float32 or bf16 tensor of `size` elements as floats; empty for none.
FloatBuffer to_floats(const std::optional<Tensor>& tensor, const char* name, int64_t size);

// The rows of x [M, width] as float32, in the plan's order.
FloatBuffer stage_rows(const void* x, Dtype dtype, int64_t M, int64_t width, const Plan& plan);

const Kernels& kernels_in_use();

// The checked weights, coefficients and row map of a call; keeps contiguous copies alive where they were needed.
class MixedLinearArgs {
 public:
  MixedLinearArgs(const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c, const Tensor& row_map);
  Rows rows_with(const Plan& plan) const;

  Weights weights;
  Rows rows;
  int64_t S;

 private:
  std::optional<Tensor> base_;
  Tensor deltas_, c_, row_map_;
};

// For rows of many weightings: rewrites the job to rows (a, c_1 a, .., c_K a) over unmixed panels, and owns these rows.
class Concatenated {
 public:
  Concatenated(GemmJob& job, Path path);

 private:
  FloatBuffer rows_;
  Segment all_{};
};

Tensor mixed_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                            const Tensor& row_map, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& bias_deltas);

Tensor mixed_linear_cpu_backward_x(const Tensor& dy, const std::optional<Tensor>& base, const Tensor& deltas,
                                   const Tensor& c, const Tensor& row_map);

// The gradients of the deltas [N, K, D] and of the coefficients [S, K]; an empty tensor for one that is not needed.
std::tuple<Tensor, Tensor> mixed_linear_cpu_backward_deltas(const Tensor& dy, const Tensor& x, const Tensor& deltas,
                                                            const Tensor& c, const Tensor& row_map, bool needs_deltas,
                                                            bool needs_coefficients);

}  // namespace clp
