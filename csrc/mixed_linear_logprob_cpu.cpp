// mixed_linear_logprob on the CPU, forward: the online softmax over chunks of the vocabulary and, where hidden alone
// needs a gradient, that gradient in the same pass: sum_v (onehot - p)_v w_v, rescaled when a row's maximum grows.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// gradient[m] = slope * (tanh' W[target] - gradient[m] / sum), W[target] the row's own mix.
void finish_gradient(const LogprobCall& call) {
  const LogitsJob& job = call.job;
  const std::vector<Segment>& segments = call.kept.plan.segments;
  const auto finish_row = [&](int64_t m, const Mix& mix, float* weights) {
    const int64_t place = call.places[m], target = call.kept.targets[m];
    kernels_in_use().mix(call.args.weights, mix, target, target + 1, 0, job.D, weights, job.D);
    const float bent = job.cap != 0.0f ? job.states.target[place] / job.cap : 0.0f;
    const float of_target = job.slope * (1.0f - bent * bent);
    const float of_sum = static_cast<float>(job.slope / job.states.sum[place]);
    float* gradient = job.gradient + m * job.D;
    for (int64_t d = 0; d < job.D; d++) gradient[d] = of_target * weights[d] - of_sum * gradient[d];
  };
  const ThreadScratch weights(job.D);
  for (size_t g = 0; g < segments.size(); g++) {
    const Segment& segment = segments[g];
    parallel(segment.end - segment.begin, job.D * (job.K + 2), [&](int64_t begin, int64_t end) {
      for (int64_t m = segment.begin + begin; m < segment.begin + end; m++) {
        finish_row(m, call.mixes.of_segment(static_cast<int64_t>(g)), weights.get());
      }
    });
  }
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
  LogitsJob& job = call.job;
  std::vector<float> max(job.places, -FLT_MAX), target(job.places, 0.0f);
  std::vector<double> sum(job.places, 0.0), weighted(job.places, 0.0);
  const bool in_place = call.kept.order.empty();
  const Scratch sorted = formed && !in_place ? Scratch(call.kept.size() * job.D) : Scratch();
  job.states = {max.data(), target.data(), sum.data(), weighted.data()};
  job.needs_weighted = entropy.has_value();
  if (formed) job.gradient = in_place ? floats_of(*formed) : sorted.get();
  if (sorted.get()) std::fill_n(sorted.get(), call.kept.size() * job.D, 0.0f);
  const Process process = call.process(logprob_kernels_in_use().forward, [] {});
  call.for_chunks([&](const Weights& weights) { call.products->run(weights, process, job.gradient, {}); });
  if (formed) finish_gradient(call);
  if (sorted.get()) call.scatter_rows(sorted.get(), *formed);
  for (int64_t m = 0; m < call.kept.size(); m++) {
    const int64_t row = call.kept.row(m), place = call.places[m];
    const double log_sum = std::log(sum[place]);
    floats_of(logprob)[row] = static_cast<float>(static_cast<double>(target[place]) - max[place] - log_sum);
    if (entropy) floats_of(*entropy)[row] = static_cast<float>(log_sum - weighted[place] / sum[place]);
    floats_of(normalizer)[2 * row] = max[place];
    floats_of(normalizer)[2 * row + 1] = static_cast<float>(log_sum);
  }
}

Tensor logprob_cpu_function(const Tensor& x, bool is_tanh) {
  const int64_t size = x.numel(), padded = ceil_div(size, kLanes) * kLanes;
  std::vector<float> in(padded, 0.0f), out(padded);
  kernels_in_use().widen(x.const_data_ptr(), dtype_of(x, "x"), 0, size, 1.0f, in.data());
  logprob_kernels_in_use().evaluate(in.data(), is_tanh, padded, out.data());
  Tensor y = torch::stable::new_empty(x, {size});
  std::copy_n(out.data(), size, floats_of(y));
  return y;
}

}  // namespace clp::logprob
