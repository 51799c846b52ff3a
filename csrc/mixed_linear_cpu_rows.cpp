// Few rows, rows that all differ, and batch-invariant calls: blocks of rows of x, packed, through the own kernel.
#include <algorithm>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Panels of x that one pass over the weights takes: they stay in the second-level cache or near it, and their sums in
// the first.
constexpr int64_t kPanels = 8, kPanelFloats = 1 << 19;

std::vector<Panel> list_panels(const Plan& plan, const Mixes& mixes, bool mixed, int64_t M, int64_t rows_each) {
  std::vector<Panel> panels;
  const auto cut = [&](int64_t begin, int64_t end, const Mix* mix) {
    for (int64_t m = begin; m < end; m += rows_each) panels.push_back({m, std::min(rows_each, end - m), mix});
  };
  if (!mixed) cut(0, M, nullptr);
  for (size_t g = 0; mixed && g < plan.segments.size(); g++) {
    cut(plan.segments[g].begin, plan.segments[g].end, &mixes.of_segment(static_cast<int64_t>(g)));
  }
  return panels;
}

// c[k, i] of the row at place i of the panels, zero where there is none.
std::vector<float> list_coefficients(const MixedLinearArgs& args, const Plan& plan, const RowsJob& job, int64_t width) {
  const int64_t K = args.weights.K, step = job.num_panels * width;
  std::vector<float> c(K * step, 0.0f);
  for (int64_t p = 0; p < job.num_panels; p++) {
    for (int64_t i = 0; i < job.panels[p].rows; i++) {
      const float* row = args.coefficients(plan.row(job.panels[p].first + i));
      for (int64_t k = 0; k < K; k++) c[k * step + p * width + i] = row[k];
    }
  }
  return c;
}

// Rows of x in the order of work: where they are in memory, else widened into `rows`.
const float* gather(const Array& x, const Plan& plan, int64_t first, int64_t count, int64_t D, float* rows) {
  if (x.is_float() && plan.order.empty()) return x.floats() + first * D;
  for (int64_t i = 0; i < count; i++) {
    kernels_in_use().widen(x.data, x.dtype, plan.row(first + i) * D, D, 1.0f, rows + i * D);
  }
  return rows;
}

// Whether a stream is of bf16, or of another dtype.
bool reads(const RowsJob& job, bool bf16) {
  return (job.streams.base && (job.weights.base_dtype == Dtype::bf16) == bf16) ||
         (job.weights.deltas_dtype == Dtype::bf16) == bf16;
}

// Sets the rows of x that dots read; those that have to be made lie in `scratch`, 2 * M * D floats.
void set_dot_rows(const Array& x, const Plan& plan, int64_t M, float* scratch, RowsJob& job) {
  const Kernels& kernels = kernels_in_use();
  const int64_t D = job.weights.D;
  if (kernels.dots_take_bf16 && x.dtype == Dtype::bf16) job.x_bf16 = static_cast<const Bf16*>(x.data);
  const bool even_first = reads(job, true) && !job.x_bf16;
  if (even_first || reads(job, false)) job.x = gather(x, plan, 0, M, D, scratch);
  if (!even_first) return;
  job.x_even_first = scratch + M * D;
  for (int64_t i = 0; i < M; i++) kernels.even_terms_first(job.x + i * D, D, scratch + (M + i) * D);
}

}  // namespace

void run_rows(const MixedLinearArgs& args, const Plan& plan, const Mixes& mixes, bool mixed, const Array& x,
              const Bias& bias, void* y, Dtype y_dtype) {
  const Kernels& kernels = kernels_in_use();
  const Weights& w = args.weights;
  const int64_t D = w.D, width = kernels.panel_rows;
  const bool dots = !mixed && args.M <= kernels.max_dots;
  const std::vector<Panel> panels = list_panels(plan, mixes, mixed, args.M, width);
  const int64_t most = std::clamp<int64_t>(kPanelFloats / std::max<int64_t>(width * D, 1), 1, kPanels);
  const int64_t together = std::min<int64_t>(most, static_cast<int64_t>(panels.size()));
  const bool in_place = x.is_float() && plan.order.empty();
  const ThreadScratch unpacked(in_place || dots ? 0 : width * D);
  RowsJob job{w,       mixes.any(), nullptr, 0,       nullptr, nullptr, nullptr,
              dots,    nullptr,     nullptr, nullptr, nullptr, y,       y_dtype};
  if (!bias.bias.empty()) job.bias = bias.bias.data();
  if (!bias.bias_deltas.empty()) job.bias_deltas = bias.bias_deltas.data();
  if (!plan.order.empty()) job.order = plan.order.data();
  job.num_panels = together;
  const Scratch packed(!dots ? together * width * D : in_place && !reads(job, true) ? 0 : 2 * args.M * D);
  const ThreadScratch sums(rows_scratch(kernels, job));
  for (size_t first = 0; first < panels.size(); first += together) {
    job.panels = panels.data() + first;
    job.num_panels = std::min<int64_t>(together, static_cast<int64_t>(panels.size() - first));
    const std::vector<float> c = list_coefficients(args, plan, job, width);
    job.c = c.data();
    if (dots) {
      set_dot_rows(x, plan, args.M, packed.get(), job);
    } else {
      job.x = packed.get();
      parallel(job.num_panels, width * D, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const Panel& panel = job.panels[p];
          const float* rows = gather(x, plan, panel.first, panel.rows, D, unpacked.get());
          kernels.pack(rows, panel.rows, D, D, packed.get() + p * width * D);
        }
      });
    }
    // Bytes of weights count as well as multiply-adds: one row reads all of them.
    const int64_t work = kernels.group * D * (job.streams.count + 1) * job.num_panels;
    parallel(ceil_div(w.N, kernels.group), work,
             [&](int64_t begin, int64_t end) { kernels.rows(job, begin, end, sums.get()); });
  }
}

}  // namespace clp
