// mixed_linear_logprob on the CPU, forward: the online softmax over chunks of the vocabulary and, where hidden alone
// needs a gradient, that gradient in the same pass: sum_v (onehot - p)_v w_v, rescaled when a row's maximum grows.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void finish_gradient(const LogprobCall& call) {
  MixJob whole{call.args.weights.base, call.args.weights.deltas, call.args.weights.base_dtype,
               call.args.weights.deltas_dtype, call.job.K, call.job.K, call.job.D, nullptr, nullptr};
  const LogprobKernels& kernels = logprob_kernels_in_use();
  parallel(call.job.M, call.job.D * (call.job.K + 2), [&](int64_t begin, int64_t end) {
    std::vector<float> row(call.job.D);
    kernels.finish({whole, &call.job, row.data()}, begin, end);
  });
}

}  // namespace

// Outputs hold zeros: what rows without a target keep.
void mixed_linear_logprob_cpu_fwd(const Tensor& hidden, const std::optional<Tensor>& base, const Tensor& deltas,
                                  const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& bias_deltas, const Tensor& targets, int64_t ignore_index,
                                  double temperature, double logit_scale, std::optional<double> softcap,
                                  const Tensor& logprob, const std::optional<Tensor>& entropy, const Tensor& normalizer,
                                  const std::optional<Tensor>& formed) {
  LogprobCall call({hidden, base, deltas, c, row_map, bias, bias_deltas, targets, ignore_index, temperature,
                    logit_scale, softcap});
  RowsJob& job = call.job;
  std::vector<RowState> states(job.M, RowState{-FLT_MAX, 0.0f, 0.0f, 0.0, 0.0});
  const Scratch sorted = formed && !call.keeps_order() ? Scratch(job.M * job.D) : Scratch();
  job.states = states.data();
  job.needs_weighted = entropy.has_value();
  if (formed) job.gradient = sorted.get() ? sorted.get() : floats_of(*formed);
  if (sorted.get()) std::fill_n(sorted.get(), job.M * job.D, 0.0f);
  for (int64_t first = 0; first < call.args.weights.N && job.M > 0; first += call.chunk) {
    call.begin_chunk(first, std::min(call.chunk, call.args.weights.N - first));
    call.process_rows(logprob_kernels_in_use().forward, nullptr, job.gradient);
  }
  if (formed) finish_gradient(call);
  if (sorted.get()) call.scatter_rows(sorted.get(), *formed);
  for (int64_t m = 0; m < job.M; m++) {
    const RowState& state = states[m];
    const int64_t row = call.row_of(m);
    const double log_sum = std::log(state.sum);
    floats_of(logprob)[row] = static_cast<float>(static_cast<double>(state.target) - state.max - log_sum);
    if (entropy) floats_of(*entropy)[row] = static_cast<float>(log_sum - state.weighted / state.sum);
    floats_of(normalizer)[2 * row] = state.max;
    floats_of(normalizer)[2 * row + 1] = static_cast<float>(log_sum);
  }
}

Tensor logprob_cpu_function(const Tensor& x, bool is_tanh) {
  const int64_t size = x.numel(), padded = ceil_div(size, kLogitLanes) * kLogitLanes;
  std::vector<float> in(padded, 0.0f), out(padded);
  kernels_in_use().widen(x.const_data_ptr(), dtype_of(x, "x"), 0, size, 1.0f, in.data());
  logprob_kernels_in_use().evaluate(in.data(), is_tanh, padded, out.data());
  Tensor y = torch::stable::new_empty(x, {size});
  std::copy_n(out.data(), size, floats_of(y));
  return y;
}

}  // namespace clp::logprob
