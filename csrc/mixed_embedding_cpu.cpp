// mixed_embedding on the CPU: checks, the order of the rows, and the threads that run the kernels.
#include "mixed_embedding_cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_pages.h"
#include "mixed_embedding_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;

const EmbeddingKernels& embedding_kernels_in_use() {
#if defined(__x86_64__)
  return in_use(embedding_kernels_portable, embedding_kernels_avx2, embedding_kernels_avx512);
#else
  return embedding_kernels_portable;
#endif
}

Tensor checked_ids(const Tensor& ids, int64_t V) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids must be int64 [M]");
  const Tensor checked = as_contiguous(ids);
  const int64_t* id = static_cast<const int64_t*>(checked.const_data_ptr());
  for (int64_t m = 0; m < checked.size(0); m++) {
    if (id[m] < 0 || id[m] >= V) {
      throw std::out_of_range("ids hold " + std::to_string(id[m]) + ", outside [0, " + std::to_string(V) +
                              ") of the embedding's rows");
    }
  }
  return checked;
}

EmbeddingTables tables_of(const Tensor& deltas, Dtype base_dtype) {
  STD_TORCH_CHECK(deltas.dim() == 3, "deltas must be [V, K, D]");
  return {nullptr,        deltas.const_data_ptr(), base_dtype,     dtype_of(deltas, "deltas"),
          deltas.size(0), deltas.size(1),          deltas.size(2)};
}

// Rows sorted by id, in their own order within one.
std::vector<IdGroup> group_by_id(const int64_t* ids, int64_t M, std::vector<int64_t>& order) {
  order.resize(M);
  for (int64_t m = 0; m < M; m++) order[m] = m;
  const auto comes_first = [ids](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; };
  std::sort(order.begin(), order.end(), comes_first);
  std::vector<IdGroup> groups;
  for (int64_t r = 0; r < M; r++) {
    if (groups.empty() || groups.back().id != ids[order[r]]) groups.push_back({r, r, ids[order[r]]});
    groups.back().end = r + 1;
  }
  return groups;
}

// An uninitialised tensor filled with zeros by all threads, or an empty one.
Tensor zeros_where(bool needed, const Tensor& like, std::vector<int64_t> shape) {
  Tensor zeros = torch::stable::new_empty(like, needed ? shape : std::vector<int64_t>{0});
  const int64_t each = static_cast<int64_t>(zeros.element_size());
  char* data = static_cast<char*>(zeros.mutable_data_ptr());
  make_pages(zeros);
  parallel_rows(zeros.numel(), 1, [&](int64_t begin, int64_t end) {
    std::memset(data + begin * each, 0, (end - begin) * each);
  });
  return zeros;
}

}  // namespace

Tensor mixed_embedding_cpu_fwd(const Tensor& ids, const std::optional<Tensor>& base, const Tensor& deltas,
                               const Tensor& c, const Tensor& row_map) {
  const Tensor copies = as_contiguous(deltas), table = base ? as_contiguous(*base) : copies;
  EmbeddingTables tables = tables_of(copies, dtype_of(table, "base"));
  if (base) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == tables.V && table.size(1) == tables.D, "base must be [",
                    tables.V, ", ", tables.D, "]");
    tables.base = table.const_data_ptr();
  }
  const Tensor positions = checked_ids(ids, tables.V);
  const int64_t M = positions.size(0);
  const RowCoefficients rows(c, row_map, M, tables.K);
  Tensor y = torch::stable::new_empty(table, {M, tables.D});
  const EmbeddingJob job{tables, static_cast<const int64_t*>(positions.const_data_ptr()), rows.row_map, rows.c,
                         y.mutable_data_ptr()};
  const EmbeddingKernels& kernels = embedding_kernels_in_use();
  parallel_rows(M, (tables.K + 1) * tables.D,
                [&](int64_t begin, int64_t end) { kernels.forward(job, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mixed_embedding_cpu_backward(const Tensor& dy, const Tensor& ids,
                                                                const Tensor& deltas, const Tensor& c,
                                                                const Tensor& row_map, int64_t padding_idx,
                                                                bool needs_base, bool needs_deltas,
                                                                bool needs_coefficients,
                                                                const std::optional<Tensor>& main_grad) {
  const Tensor copies = as_contiguous(deltas);
  const EmbeddingTables tables = tables_of(copies, dtype_of(dy, "dy"));
  const int64_t V = tables.V, K = tables.K, D = tables.D;
  const Tensor positions = checked_ids(ids, V);
  const int64_t M = positions.size(0);
  const Tensor dy_rows = contiguous_rows(dy, "dy", M, D);
  const RowCoefficients rows(c, row_map, M, K);
  const bool adds_deltas = needs_deltas && main_grad;
  Tensor d_base = zeros_where(needs_base, dy_rows, {V, D});
  Tensor d_deltas = zeros_where(needs_deltas && !adds_deltas, copies, {V, K, D});
  std::vector<double> terms(needs_coefficients ? M * K : 0);
  std::vector<int64_t> order;
  const std::vector<IdGroup> groups =
      group_by_id(static_cast<const int64_t*>(positions.const_data_ptr()), M, order);
  const EmbeddingGradJob job{tables,
                             rows.row_map,
                             rows.c,
                             dy_rows.const_data_ptr(),
                             order.data(),
                             groups.data(),
                             padding_idx,
                             needs_base ? d_base.mutable_data_ptr() : nullptr,
                             adds_deltas    ? main_grad_floats(*main_grad, V, K, D)
                             : needs_deltas ? d_deltas.mutable_data_ptr()
                                            : nullptr,
                             adds_deltas,
                             needs_coefficients ? terms.data() : nullptr};
  const EmbeddingKernels& kernels = embedding_kernels_in_use();
  parallel_rows(static_cast<int64_t>(groups.size()), (K + 1) * D, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * (K + 1) * D);
    kernels.backward(job, begin, end, scratch.data());
  });
  return {d_base, d_deltas, needs_coefficients ? rows.gradient(terms.data()) : torch::stable::new_empty(c, {0})};
}

}  // namespace clp
