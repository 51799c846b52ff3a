// mixed_linear on the CPU: checks, the staging of rows, and the threads that run the kernels. Forward and gradient of x;
// the gradients of the deltas and coefficients are in mixed_linear_cpu_grad.cpp.
#include <algorithm>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Multiply-adds that one thread should have at the least: waking a thread costs a few microseconds.
constexpr int64_t kGrain = 200000;

void run_stream(const MixedLinearArgs& args, StreamJob& job) {
  const Kernels& kernels = kernels_in_use();
  const int64_t work = args.rows.M * args.weights.D * (args.weights.K + 1);
  // Bytes of weights count as well as multiply-adds: one row reads all of them.
  parallel(args.weights.N, kGrain / std::max<int64_t>(work, 1) + 1,
           [&](int64_t begin, int64_t end) { kernels.stream(job, begin, end); });
}

void run_gemm(GemmJob& job) {
  const Kernels& kernels = kernels_in_use();
  const int64_t panels = ceil_div(job.columns, kernels.panel_columns);
  // Rows are split as well where there are fewer than 2 panels a thread; every sum keeps its order.
  const int64_t chunks = std::clamp<int64_t>(ceil_div(2 * num_threads(), panels), 1, ceil_div(job.rows.M, 128));
  job.row_chunk = panels >= 2 * num_threads() ? job.rows.M : ceil_div(job.rows.M, chunks);
  const int64_t items = panels * ceil_div(job.rows.M, job.row_chunk);
  const int64_t work = job.row_chunk * job.length * kernels.panel_columns;
  parallel(items, kGrain / std::max<int64_t>(work, 1) + 1, [&](int64_t begin, int64_t end) {
    const FloatBuffer panel(kernels.panel_columns * job.length);
    kernels.gemm(job, begin, end, panel.get());
  });
}

}  // namespace

const Kernels& kernels_in_use() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::portable:
      return kernels_portable;
    case Isa::avx2:
      return kernels_avx2;
    case Isa::avx512:
      return kernels_avx512;
    case Isa::avx512_bf16:
      return kernels_avx512_bf16;
  }
#endif
  return kernels_portable;
}

FloatBuffer stage_rows(const void* x, Dtype dtype, int64_t M, int64_t width, const Plan& plan) {
  FloatBuffer staged(M * width);
  parallel(M, kGrain / std::max<int64_t>(width, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const int64_t row = plan.order.empty() ? m : plan.order[m];
      copy_to_float(x, dtype, row * width, width, staged.get() + m * width);
    }
  });
  return staged;
}

Tensor mixed_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                            const Tensor& row_map, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& bias_deltas) {
  const MixedLinearArgs args(base, deltas, c, row_map);
  const int64_t M = args.rows.M, N = args.weights.N, D = args.weights.D, K = args.weights.K;
  const Tensor rows = contiguous_rows(x, "x", M, D);
  Tensor y = torch::stable::new_empty(rows, {M, N});
  if (M == 0 || N == 0) return y;
  const FloatBuffer bias_floats = to_floats(bias, "bias", N), bias_delta_floats = to_floats(bias_deltas, "bias_deltas", N * K);
  const Dtype dtype = dtype_of(rows, "x");
  Plan plan = plan_rows(args.rows.row_map, M, args.S);
  const Path path = choose_path(M, static_cast<int64_t>(plan.segments.size()), K, args.weights.base != nullptr, true);
  if (path == Path::stream) plan.order.clear();
  const bool staged_in_place = dtype == Dtype::f32 && plan.order.empty();
  const FloatBuffer staged =
      staged_in_place ? FloatBuffer() : stage_rows(rows.const_data_ptr(), dtype, M, D, plan);
  const float* x_floats = staged_in_place ? static_cast<const float*>(rows.const_data_ptr()) : staged.get();
  const Rows plan_of_rows = args.rows_with(plan);
  if (path == Path::stream) {
    StreamJob job{args.weights, plan_of_rows, x_floats, nullptr, bias_floats.get(), bias_delta_floats.get(),
                  y.mutable_data_ptr(), dtype};
    if (dtype == Dtype::bf16) job.x_bf16 = static_cast<const Bf16*>(rows.const_data_ptr());
    run_stream(args, job);
    return y;
  }
  GemmJob job{args.weights, plan_of_rows, false, false, x_floats, D, N, bias_floats.get(), bias_delta_floats.get(),
              y.mutable_data_ptr(), dtype, M};
  const Concatenated concatenated(job, path);
  run_gemm(job);
  return y;
}

Tensor mixed_linear_cpu_backward_x(const Tensor& dy, const std::optional<Tensor>& base, const Tensor& deltas,
                                   const Tensor& c, const Tensor& row_map) {
  const MixedLinearArgs args(base, deltas, c, row_map);
  const int64_t M = args.rows.M, N = args.weights.N, D = args.weights.D, K = args.weights.K;
  const Tensor rows = contiguous_rows(dy, "dy", M, N);
  Tensor dx = torch::stable::new_empty(rows, {M, D});
  if (M == 0 || D == 0) return dx;
  const Dtype dtype = dtype_of(rows, "dy");
  const Plan plan = plan_rows(args.rows.row_map, M, args.S);
  const Path path = choose_path(M, static_cast<int64_t>(plan.segments.size()), K, args.weights.base != nullptr, false);
  const bool staged_in_place = dtype == Dtype::f32 && plan.order.empty();
  const FloatBuffer staged = staged_in_place ? FloatBuffer() : stage_rows(rows.const_data_ptr(), dtype, M, N, plan);
  const float* dy_floats = staged_in_place ? static_cast<const float*>(rows.const_data_ptr()) : staged.get();
  GemmJob job{args.weights, args.rows_with(plan), true, false, dy_floats, N, D, nullptr, nullptr,
              dx.mutable_data_ptr(), dtype, M};
  const Concatenated concatenated(job, path);
  run_gemm(job);
  return dx;
}

Concatenated::Concatenated(GemmJob& job, Path path) {
  if (path != Path::concatenated_panels) return;
  const int64_t M = job.rows.M, K = job.weights.K, length = job.length;
  const int64_t first_copy = job.weights.base ? 1 : 0, streams = K + first_copy;
  rows_ = FloatBuffer(M * streams * length);
  const float* a = job.a;
  parallel(M, kGrain / std::max<int64_t>(streams * length, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const int64_t row = job.rows.order ? job.rows.order[m] : m;
      const float* c = job.rows.c + job.rows.row_map[row] * K;
      float* out = rows_.get() + m * streams * length;
      if (first_copy) out = std::copy_n(a + m * length, length, out);
      for (int64_t k = 0; k < K; k++) {
        for (int64_t i = 0; i < length; i++) *out++ = c[k] * a[m * length + i];
      }
    }
  });
  all_ = {0, M, 0};
  job.rows.segments = &all_;
  job.rows.num_segments = 1;
  job.a = rows_.get();
  job.length = streams * length;
  job.concatenated = true;
}

}  // namespace clp
