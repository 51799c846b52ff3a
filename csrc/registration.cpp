// Every compiled operator's schema, once, and the CPU implementations. Operators whose kernel is Python are declared in
// clp_kernels/<operator>_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu_features.h"
#include "low_rank_linear_cpu_ops.h"
#include "mixed_embedding_cpu_ops.h"
#include "mixed_linear_cpu_ops.h"
#include "mixed_linear_logprob_cpu_call.h"
#include "mixed_norm_cpu_ops.h"
#include "mixed_qkv_cpu_ops.h"

namespace clp {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string cpu_best_isa() { return isa_name(best_isa()); }

void cpu_set_isa(std::string name) { set_isa(name); }

}  // namespace clp

STABLE_TORCH_LIBRARY_FRAGMENT(clp, m) {
  m.def(
      "mixed_linear_cpu_fwd(Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor? row_map, "
      "Tensor? bias, Tensor? bias_deltas, bool batch_invariant=False, bool exact_delta=True) -> Tensor");
  m.def(
      "mixed_linear_cpu_backward_x(Tensor dy, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, "
      "bool batch_invariant=False, bool exact_delta=True) -> Tensor");
  m.def(
      "mixed_linear_cpu_backward_deltas(Tensor dy, Tensor x, Tensor deltas, Tensor c, Tensor row_map, "
      "bool needs_deltas, bool needs_coefficients, Tensor(a!)? main_grad=None, bool batch_invariant=False) -> "
      "(Tensor, Tensor)");
  m.def(
      "mixed_linear_cuda_fwd(Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, "
      "Tensor? bias_deltas) -> Tensor");
  m.def(
      "mixed_linear_sm90_product(Tensor rows, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, "
      "Tensor? bias_deltas, bool transposed, bool exact_delta) -> Tensor");
  m.def(
      "mixed_embedding_cpu_fwd(Tensor ids, Tensor? base, Tensor deltas, Tensor c, Tensor row_map) -> Tensor");
  m.def(
      "mixed_embedding_cpu_backward(Tensor dy, Tensor ids, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, "
      "bool needs_base, bool needs_deltas, bool needs_coefficients, Tensor(a!)? main_grad=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "mixed_norm_cpu_fwd(Tensor x, Tensor? weight, Tensor weight_deltas, Tensor c, Tensor row_map, Tensor? bias, "
      "Tensor? bias_deltas, float eps, bool is_centered, float offset, bool cast_before_scale) -> Tensor");
  m.def(
      "mixed_norm_cpu_backward(Tensor dy, Tensor x, Tensor? weight, Tensor weight_deltas, Tensor c, Tensor row_map, "
      "Tensor? bias_deltas, float eps, bool is_centered, float offset, bool cast_before_scale, bool needs_x, "
      "bool needs_weight, bool needs_weight_deltas, bool needs_bias, bool needs_bias_deltas, bool needs_coefficients) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mixed_qkv_cpu_fwd(Tensor x, Tensor norm_weight, Tensor q_base, Tensor q_deltas, Tensor? q_bias, "
      "Tensor? q_bias_deltas, Tensor k_base, Tensor k_deltas, Tensor? k_bias, Tensor? k_bias_deltas, Tensor v_base, "
      "Tensor v_deltas, Tensor? v_bias, Tensor? v_bias_deltas, Tensor c, Tensor row_map, Tensor cos, Tensor sin, "
      "Tensor? q_norm, Tensor? k_norm, float eps, bool batch_invariant) -> (Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_linear_cpu_fwd(Tensor x, Tensor? base, Tensor down, Tensor up, Tensor gates, Tensor? row_map, "
      "Tensor? bias, bool keep_shrink) -> (Tensor, Tensor)");
  m.def(
      "low_rank_linear_cpu_backward(Tensor dy, Tensor shrink, Tensor x, Tensor? base, Tensor down, Tensor up, "
      "Tensor gates, Tensor row_map, bool needs_x, bool needs_base, bool needs_down, bool needs_up, bool needs_gates) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mixed_linear_logprob_cpu_fwd(Tensor hidden, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, "
      "Tensor? bias, Tensor? bias_deltas, Tensor targets, int ignore_index, float temperature, float logit_scale, "
      "float? softcap, Tensor(a!) logprob, Tensor(b!)? entropy, Tensor(c!) normalizer, Tensor(d!)? formed) -> ()");
  m.def(
      "mixed_linear_logprob_cpu_backward(Tensor hidden, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, "
      "Tensor? bias, Tensor? bias_deltas, Tensor targets, int ignore_index, float temperature, float logit_scale, "
      "float? softcap, Tensor normalizer, Tensor? entropy, Tensor d_logprob, Tensor? d_entropy, Tensor(a!)? d_hidden, "
      "Tensor(b!)? d_base, Tensor(c!)? d_deltas, Tensor(d!)? d_c, Tensor(e!)? d_bias, "
      "Tensor(f!)? d_bias_deltas, bool adds_deltas) -> ()");
  m.def("logprob_cpu_function(Tensor x, bool is_tanh) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_best_isa() -> str");
  m.def("cpu_set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clp, CPU, m) {
  m.impl("mixed_linear_cpu_fwd", TORCH_BOX(&clp::mixed_linear_cpu_call));
  m.impl("mixed_linear_cpu_backward_x", TORCH_BOX(&clp::mixed_linear_cpu_backward_x));
  m.impl("mixed_linear_cpu_backward_deltas", TORCH_BOX(&clp::mixed_linear_cpu_backward_deltas));
  m.impl("mixed_embedding_cpu_fwd", TORCH_BOX(&clp::mixed_embedding_cpu_fwd));
  m.impl("mixed_embedding_cpu_backward", TORCH_BOX(&clp::mixed_embedding_cpu_backward));
  m.impl("mixed_norm_cpu_fwd", TORCH_BOX(&clp::mixed_norm_cpu_fwd));
  m.impl("mixed_norm_cpu_backward", TORCH_BOX(&clp::mixed_norm_cpu_backward));
  m.impl("mixed_qkv_cpu_fwd", TORCH_BOX(&clp::mixed_qkv_cpu_fwd));
  m.impl("low_rank_linear_cpu_fwd", TORCH_BOX(&clp::low_rank_linear_cpu_call));
  m.impl("low_rank_linear_cpu_backward", TORCH_BOX(&clp::low_rank_linear_cpu_backward));
  m.impl("mixed_linear_logprob_cpu_fwd", TORCH_BOX(&clp::logprob::mixed_linear_logprob_cpu_fwd));
  m.impl("mixed_linear_logprob_cpu_backward", TORCH_BOX(&clp::logprob::mixed_linear_logprob_cpu_backward));
  m.impl("logprob_cpu_function", TORCH_BOX(&clp::logprob::logprob_cpu_function));
}

STABLE_TORCH_LIBRARY_IMPL(clp, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&clp::cpu_isa));
  m.impl("cpu_best_isa", TORCH_BOX(&clp::cpu_best_isa));
  m.impl("cpu_set_isa", TORCH_BOX(&clp::cpu_set_isa));
}
