// Gradients of mixed_linear's deltas and coefficients on the CPU.
#include <algorithm>
#include <cstring>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

constexpr int64_t kGrain = 200000;

// Rows of a segment from which one product per segment is cheaper than one per copy.
constexpr int64_t kShortSegment = 8;

// dy [M, N] as [ceil(N / block), M, block], zero past N, each row times c of `copy` where copy >= 0.
FloatBuffer block_outputs(const void* dy, Dtype dtype, const Rows& rows, int64_t N, int64_t K, int64_t block,
                          int64_t copy) {
  const int64_t blocks = ceil_div(N, block), M = rows.M;
  FloatBuffer blocked(blocks * M * block);
  parallel(M, kGrain / std::max<int64_t>(N, 1) + 1, [&](int64_t begin, int64_t end) {
    const FloatBuffer values(blocks * block);
    std::fill_n(values.get(), blocks * block, 0.0f);
    for (int64_t m = begin; m < end; m++) {
      const int64_t row = rows.order ? rows.order[m] : m;
      copy_to_float(dy, dtype, row * N, N, values.get());
      const float scale = copy < 0 ? 1.0f : rows.c[rows.row_map[row] * K + copy];
      for (int64_t b = 0; b < blocks; b++) {
        float* out = blocked.get() + (b * M + m) * block;
        for (int64_t i = 0; i < block; i++) out[i] = scale * values.get()[b * block + i];
      }
    }
  });
  return blocked;
}

void run_grad(const GradJob& job) {
  const Kernels& kernels = kernels_in_use();
  const Weights& w = job.weights;
  const int64_t items = ceil_div(w.D, kernels.panel_columns);
  const int64_t work = job.rows.M * w.N * kernels.panel_columns;
  parallel(items, kGrain / std::max<int64_t>(work, 1) + 1, [&](int64_t begin, int64_t end) {
    const FloatBuffer scratch(kernels.panel_columns * (job.rows.M + 2 * w.K * kernels.grad_rows));
    kernels.grad(job, begin, end, scratch.get());
  });
}

// Sums the work items' parts in their order.
void sum_parts(const FloatBuffer& parts, int64_t items, int64_t size, float* out) {
  const double* part = reinterpret_cast<const double*>(parts.get());
  for (int64_t i = 0; i < size; i++) {
    double total = 0.0;
    for (int64_t item = 0; item < items; item++) total += part[item * size + i];
    out[i] = static_cast<float>(total);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> mixed_linear_cpu_backward_deltas(const Tensor& dy, const Tensor& x, const Tensor& deltas,
                                                            const Tensor& c, const Tensor& row_map, bool needs_deltas,
                                                            bool needs_coefficients) {
  const MixedLinearArgs args(std::nullopt, deltas, c, row_map);
  const int64_t M = args.rows.M, N = args.weights.N, D = args.weights.D, K = args.weights.K, S = args.S;
  const Tensor dy_rows = contiguous_rows(dy, "dy", M, N), x_rows = contiguous_rows(x, "x", M, D);
  const Kernels& kernels = kernels_in_use();
  Tensor d_deltas = needs_deltas ? torch::stable::new_empty(deltas, {N, K, D}) : torch::stable::new_empty(deltas, {0});
  Tensor d_c = needs_coefficients ? torch::stable::new_empty(c, {S, K}) : torch::stable::new_empty(c, {0});
  const int64_t items = ceil_div(D, kernels.panel_columns);
  const Plan plan = plan_rows(args.rows.row_map, M, S);
  const Rows rows = args.rows_with(plan);
  const Dtype dtype = dtype_of(x_rows, "x"), dy_dtype = dtype_of(dy_rows, "dy");
  const bool staged_in_place = dtype == Dtype::f32 && plan.order.empty();
  const FloatBuffer staged = staged_in_place ? FloatBuffer() : stage_rows(x_rows.const_data_ptr(), dtype, M, D, plan);
  const float* x_floats = staged_in_place ? static_cast<const float*>(x_rows.const_data_ptr()) : staged.get();
  GradJob job{args.weights, rows, nullptr, x_floats, nullptr, nullptr, S, -1};

  const bool short_segments = M < kShortSegment * rows.num_segments && K > 0;
  if (needs_coefficients || (needs_deltas && !short_segments)) {
    const FloatBuffer blocked =
        block_outputs(dy_rows.const_data_ptr(), dy_dtype, rows, N, K, kernels.grad_rows, -1);
    const FloatBuffer parts(needs_coefficients ? items * S * K * 2 : 0);
    job.dy = blocked.get();
    if (needs_deltas && !short_segments) job.d_deltas = d_deltas.mutable_data_ptr();
    if (needs_coefficients) {
      job.d_c = reinterpret_cast<double*>(parts.get());
      std::fill_n(job.d_c, items * S * K, 0.0);
    }
    run_grad(job);
    if (needs_coefficients) sum_parts(parts, items, S * K, static_cast<float*>(d_c.mutable_data_ptr()));
  }
  if (needs_deltas && short_segments) {
    const Segment all{0, M, 0};
    job.rows.segments = &all;
    job.rows.num_segments = 1;
    job.d_deltas = d_deltas.mutable_data_ptr();
    job.d_c = nullptr;
    for (job.only_copy = 0; job.only_copy < K; job.only_copy++) {
      const FloatBuffer blocked =
          block_outputs(dy_rows.const_data_ptr(), dy_dtype, rows, N, K, kernels.grad_rows, job.only_copy);
      job.dy = blocked.get();
      run_grad(job);
    }
  }
  return {d_deltas, d_c};
}

}  // namespace clp
