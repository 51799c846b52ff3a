// Every compiled operator's schema, once, and the CPU implementations. Operators whose kernel is Python are declared in
// clp_kernels/mixed_linear_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string cpu_best_isa() { return isa_name(best_isa()); }

void cpu_set_isa(std::string name) { set_isa(name); }

}  // namespace clp

STABLE_TORCH_LIBRARY_FRAGMENT(clp, m) {
  m.def(
      "mixed_linear_cpu_fwd(Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, "
      "Tensor? bias_deltas) -> Tensor");
  m.def(
      "mixed_linear_cpu_backward_x(Tensor dy, Tensor? base, Tensor deltas, Tensor c, Tensor row_map) -> Tensor");
  m.def(
      "mixed_linear_cpu_backward_deltas(Tensor dy, Tensor x, Tensor deltas, Tensor c, Tensor row_map, "
      "bool needs_deltas, bool needs_coefficients) -> (Tensor, Tensor)");
  m.def(
      "mixed_linear_cuda_fwd(Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, "
      "Tensor? bias_deltas) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_best_isa() -> str");
  m.def("cpu_set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clp, CPU, m) {
  m.impl("mixed_linear_cpu_fwd", TORCH_BOX(&clp::mixed_linear_cpu_fwd));
  m.impl("mixed_linear_cpu_backward_x", TORCH_BOX(&clp::mixed_linear_cpu_backward_x));
  m.impl("mixed_linear_cpu_backward_deltas", TORCH_BOX(&clp::mixed_linear_cpu_backward_deltas));
}

STABLE_TORCH_LIBRARY_IMPL(clp, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&clp::cpu_isa));
  m.impl("cpu_best_isa", TORCH_BOX(&clp::cpu_best_isa));
  m.impl("cpu_set_isa", TORCH_BOX(&clp::cpu_set_isa));
}
