// Products of float32 matrices anywhere in memory, by torch's own GEMM.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace clp {

// One of its steps is 1.
struct Matrix {
  float* data;
  int64_t rows, columns, row_step, column_step;

  Matrix transposed() const { return {data, columns, rows, column_step, row_step}; }
  Matrix row_range(int64_t begin, int64_t end) const {
    return {data + begin * row_step, end - begin, columns, row_step, column_step};
  }
  Matrix column_range(int64_t begin, int64_t end) const {
    return {data + begin * column_step, rows, end - begin, row_step, column_step};
  }
};

// A matrix that is only read.
inline Matrix read_only(const float* data, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step) {
  return {const_cast<float*>(data), rows, columns, row_step, column_step};
}

// out = a b, or, where `add`, out + a b. By the C functions that AOTInductor's compiled models call: no autograd,
// autocast or dispatcher in between, whose stable call takes no Scalar, which addmm has.
void gemm(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b, bool add);
void gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool add);

// out = bias + a b, in F.linear's own call: bias [columns].
void gemm_with_bias(const torch::stable::Tensor& out, const torch::stable::Tensor& bias,
                    const torch::stable::Tensor& a, const torch::stable::Tensor& b);

}  // namespace clp
