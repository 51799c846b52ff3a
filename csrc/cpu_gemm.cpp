#include "cpu_gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

namespace clp {

using torch::stable::Tensor;

namespace {

Tensor view(const Matrix& m) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_step, m.column_step},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

}  // namespace

void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

void gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  if (out.rows > 0 && out.columns > 0) gemm(view(out), view(a), view(b), add);
}

void gemm_with_bias(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace clp
