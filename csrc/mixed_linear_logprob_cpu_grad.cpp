// mixed_linear_logprob on the CPU, backward: makes each chunk's logits again, turns them into their gradients and
// spreads these over hidden and the parameters, so that a chunk's gradients are written once.
#include <algorithm>
#include <cstring>

#include "cpu_pages.h"
#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

// The gradients of the parameters asked for, and what one chunk adds to them.
class Gradients {
 public:
  Gradients(LogprobCall& call, const std::optional<Tensor>& d_base, const std::optional<Tensor>& d_deltas,
            const std::optional<Tensor>& d_c, const std::optional<Tensor>& d_bias,
            const std::optional<Tensor>& d_bias_deltas, bool adds_deltas)
      : call_(call), d_base_(d_base), d_deltas_(d_deltas), d_c_(d_c), d_bias_(d_bias), d_bias_deltas_(d_bias_deltas),
        adds_deltas_(adds_deltas) {
    const LogitsJob& job = call.job;
    if (d_c) d_c_places_.assign(job.K * job.places, 0.0);
    if (d_c) d_c_SK_.assign(call.args.S * job.K, 0.0);
    if (d_bias) bias_.resize(job.capacity);
    if (d_bias_deltas) bias_deltas_.resize(job.K * job.capacity);
  }

  // After the logits have become their gradients, and before they are spread.
  void sum_chunk() {
    const LogitsJob& job = call_.job;
    const LogprobKernels& kernels = logprob_kernels_in_use();
    const SumsJob sums{&job, d_bias_ ? bias_.data() : nullptr, d_bias_deltas_ ? bias_deltas_.data() : nullptr,
                       d_c_places_.data()};
    if (d_bias_ || d_bias_deltas_) {
      parallel(job.tokens, job.places * (1 + (d_bias_deltas_ ? job.K : 0)),
               [&](int64_t begin, int64_t end) { kernels.sum_tokens(sums, begin, end); });
    }
    if (d_c_ && (job.copies || job.bias_deltas)) {
      parallel(job.places / kLanes, job.tokens * kLanes * job.K,
               [&](int64_t begin, int64_t end) { kernels.sum_places(sums, begin, end); });
    }
    for (int64_t v = 0; d_bias_ && v < job.tokens; v++) write(*d_bias_, job.first_token + v, bias_[v]);
    for (int64_t i = 0; d_bias_deltas_ && i < job.tokens * job.K; i++) {
      write(*d_bias_deltas_, job.first_token * job.K + i, bias_deltas_[i]);
    }
  }

  // Where the chunk's gradients of the weights go.
  ChunkGradients of_chunk() {
    const Weights& w = call_.args.weights;
    return {chunk_of(d_base_, w.D), chunk_of(d_deltas_, w.K * w.D), adds_deltas_, d_c_ ? d_c_SK_.data() : nullptr,
            w.N * w.D * (w.deltas_dtype == Dtype::f32 ? 4 : 2) >= kPastCaches};
  }

  void finish() {
    if (!d_c_) return;
    const LogitsJob& job = call_.job;
    for (const Segment& segment : call_.kept.plan.segments) {
      for (int64_t m = segment.begin; m < segment.end; m++) {
        for (int64_t k = 0; k < job.K; k++) {
          d_c_SK_[segment.weighting * job.K + k] += d_c_places_[k * job.places + call_.places[m]];
        }
      }
    }
    for (size_t i = 0; i < d_c_SK_.size(); i++) write(*d_c_, static_cast<int64_t>(i), static_cast<float>(d_c_SK_[i]));
  }

 private:
  static void write(const Tensor& out, int64_t at, float value) {
    kernels_in_use().narrow(&value, 1, out.mutable_data_ptr(), dtype_of(out, "a gradient"), at);
  }

  void* chunk_of(const std::optional<Tensor>& gradient, int64_t width) const {
    if (!gradient) return nullptr;
    const int64_t bytes = dtype_of(*gradient, "a gradient") == Dtype::f32 ? 4 : 2;
    return static_cast<char*>(gradient->mutable_data_ptr()) + call_.job.first_token * width * bytes;
  }

  LogprobCall& call_;
  const std::optional<Tensor>&d_base_, &d_deltas_, &d_c_, &d_bias_, &d_bias_deltas_;
  const bool adds_deltas_;
  std::vector<double> d_c_places_, d_c_SK_;
  std::vector<float> bias_, bias_deltas_;
};

}  // namespace

// d_hidden holds zeros; d_deltas is float32 and added to where `adds_deltas`; every other gradient is written whole.
void mixed_linear_logprob_cpu_backward(
    const Tensor& hidden, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
    const Tensor& row_map, const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_deltas,
    const Tensor& targets, int64_t ignore_index, double temperature, double logit_scale, std::optional<double> softcap,
    const Tensor& normalizer, const std::optional<Tensor>& entropy, const Tensor& d_logprob,
    const std::optional<Tensor>& d_entropy, const std::optional<Tensor>& d_hidden, const std::optional<Tensor>& d_base,
    const std::optional<Tensor>& d_deltas, const std::optional<Tensor>& d_c, const std::optional<Tensor>& d_bias,
    const std::optional<Tensor>& d_bias_deltas, bool adds_deltas) {
  LogprobCall call({hidden, base, deltas, c, row_map, bias, bias_deltas, targets, ignore_index, temperature,
                    logit_scale, softcap});
  LogitsJob& job = call.job;
  if (adds_deltas) main_grad_floats(*d_deltas, call.args.weights.N, job.K, job.D);
  const int64_t M = call.kept.size();
  for (const std::optional<Tensor>* gradient : {&d_base, &d_deltas, &d_c, &d_bias, &d_bias_deltas}) {
    if (!*gradient || (gradient == &d_deltas && adds_deltas)) continue;
    make_pages(**gradient);
    if (M > 0) continue;
    std::memset((*gradient)->mutable_data_ptr(), 0, (*gradient)->numel() * (*gradient)->element_size());
  }
  if (M == 0) return;
  const std::vector<float> max = call.gather(normalizer, 2, 0), log_sum = call.gather(normalizer, 2, 1);
  const std::vector<float> d_logprobs = call.gather(d_logprob, 1, 0);
  std::vector<float> entropies, d_entropies;
  if (d_entropy) entropies = call.gather(*entropy, 1, 0), d_entropies = call.gather(*d_entropy, 1, 0);
  job.max = max.data();
  job.log_sum = log_sum.data();
  job.d_logprob = d_logprobs.data();
  job.entropy = entropies.data();
  job.d_entropy = d_entropy ? d_entropies.data() : nullptr;
  const bool in_place = d_hidden && call.kept.order.empty() && dtype_of(*d_hidden, "d_hidden") == Dtype::f32;
  const Scratch sorted = d_hidden && !in_place ? Scratch(M * job.D) : Scratch();
  if (sorted.get()) std::fill_n(sorted.get(), M * job.D, 0.0f);
  float* gradient = in_place ? static_cast<float*>(d_hidden->mutable_data_ptr()) : sorted.get();
  Gradients gradients(call, d_base, d_deltas, d_c, d_bias, d_bias_deltas, adds_deltas);
  const Process process = call.process(logprob_kernels_in_use().backward, [&] { gradients.sum_chunk(); });
  call.for_chunks(
      [&](const Weights& weights) { call.products->run(weights, process, gradient, gradients.of_chunk()); });
  gradients.finish();
  if (sorted.get()) call.scatter_rows(sorted.get(), *d_hidden);
}

}  // namespace clp::logprob
