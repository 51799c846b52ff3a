// mixed_linear_logprob on the CPU, backward: makes each chunk's logits again, turns them into their gradients and
// spreads these over hidden and the parameters, so that a chunk's gradients are written once.
#include <algorithm>
#include <cstring>

#include "cpu_pages.h"
#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

// The gradients asked for, and what one chunk adds to them.
class Gradients {
 public:
  Gradients(LogprobCall& call, const std::optional<Tensor>& d_base, const std::optional<Tensor>& d_deltas,
            const std::optional<Tensor>& d_c, const std::optional<Tensor>& d_bias,
            const std::optional<Tensor>& d_bias_deltas, bool adds_deltas)
      : call_(call), d_base_(d_base), d_deltas_(d_deltas), d_c_(d_c), d_bias_(d_bias), d_bias_deltas_(d_bias_deltas),
        adds_deltas_(adds_deltas) {
    const RowsJob& job = call.job;
    sums_.rows = &job;
    if (d_c) d_c_rows_.assign(job.M * job.K, 0.0);
    if (d_c) d_c_SK_.assign(call.args.S * job.K, 0.0);
    if (d_bias) bias_.resize(job.stride);
    if (d_bias_deltas) bias_deltas_.resize(job.K * job.stride);
    if (d_bias) sums_.d_bias = bias_.data();
    if (d_bias_deltas) sums_.d_bias_deltas = bias_deltas_.data();
    if (d_c) sums_.d_c = d_c_rows_.data();
  }

  const SumsJob* sums() {
    sums_.dy = call_.job.logits;
    return &sums_;
  }

  // After process_rows: dy stands where logits stood.
  void add_chunk() {
    if (call_.mixes && (d_base_ || d_deltas_ || d_c_)) spread_segments();
    if (!call_.mixes && d_base_) spread_stream(-1);
    for (int64_t k = 0; !call_.mixes && d_deltas_ && k < call_.job.K; k++) spread_stream(k);
    const int64_t K = call_.job.K, first = call_.job.first_token;
    for (int64_t v = 0; v < call_.job.tokens; v++) {
      if (d_bias_) write(*d_bias_, first + v, bias_[v]);
      for (int64_t k = 0; d_bias_deltas_ && k < K; k++) {
        write(*d_bias_deltas_, (first + v) * K + k, bias_deltas_[k * call_.job.stride + v]);
      }
    }
  }

  void finish() {
    if (!d_c_) return;
    const int64_t K = call_.job.K;
    for (int64_t m = 0; m < call_.job.M; m++) {
      for (int64_t k = 0; k < K; k++) d_c_SK_[call_.job.weighting[m] * K + k] += d_c_rows_[m * K + k];
    }
    for (size_t i = 0; i < d_c_SK_.size(); i++) write(*d_c_, static_cast<int64_t>(i), static_cast<float>(d_c_SK_[i]));
  }

 private:
  static void write(const Tensor& out, int64_t at, float value) {
    kernels_in_use().narrow(&value, 1, out.mutable_data_ptr(), dtype_of(out, "a gradient"), at);
  }

  // Where the chunk's part of a gradient begins.
  void* chunk_of(const std::optional<Tensor>& gradient, int64_t width, int64_t at) const {
    if (!gradient) return nullptr;
    const int64_t bytes = dtype_of(*gradient, "a gradient") == Dtype::f32 ? 4 : 2;
    return static_cast<char*>(gradient->mutable_data_ptr()) + (call_.job.first_token * width + at) * bytes;
  }

  bool past_caches() const {
    const Weights& w = call_.args.weights;
    return w.N * w.D * (w.deltas_dtype == Dtype::f32 ? 4 : 2) >= kPastCaches;
  }

  void run_spread(const SpreadJob& job) const {
    const LogprobKernels& kernels = logprob_kernels_in_use();
    parallel(job.tokens, job.columns * (1 + job.num_segments * job.weights.K),
          [&](int64_t begin, int64_t end) { kernels.spread(job, begin, end); });
  }

  // G_s of a range of columns for all segments, then one pass: each gradient is written, each delta read, once.
  void spread_segments() {
    const RowsJob& job = call_.job;
    const int64_t num_segments = static_cast<int64_t>(call_.segments.size());
    std::vector<double> d_c(d_c_ ? job.tokens * num_segments * job.K : 0, 0.0);
    const int64_t fitting = std::max<int64_t>(call_.panel_floats / (num_segments * job.tokens), 1);
    const int64_t columns = fitting >= kLogitLanes ? fitting / kLogitLanes * kLogitLanes : fitting;
    for (int64_t d0 = 0; d0 < job.D; d0 += columns) {
      const int64_t width = std::min(columns, job.D - d0);
      float* products = call_.panel(1).data;
      for (int64_t g = 0; g < num_segments; g++) {
        const Segment& segment = call_.segments[g];
        const Matrix dy = call_.logits().row_range(segment.begin, segment.end);
        const Matrix x = call_.rows_of_hidden().row_range(segment.begin, segment.end).column_range(d0, d0 + width);
        const Matrix product{products + g * job.tokens * width, job.tokens, width, width, 1};
        gemm(product, dy.transposed(), x, false);
      }
      MixJob weights = call_.chunk_weights();
      weights.c = job.c;
      run_spread({products, call_.segments.data(), num_segments, job.tokens, width, d0, weights,
                  chunk_of(d_base_, job.D, 0), chunk_of(d_deltas_, job.K * job.D, 0), adds_deltas_,
                  d_c_ ? d_c.data() : nullptr, past_caches()});
    }
    for (int64_t i = 0; i < static_cast<int64_t>(d_c.size()); i++) {
      const int64_t segment = i / job.K % num_segments;
      d_c_SK_[call_.segments[segment].weighting * job.K + i % job.K] += d_c[i];
    }
  }

  // The gradient of one stream of weights, the base for k = -1: a product with dy or, for a copy, with c_k dy.
  void spread_stream(int64_t k) {
    const RowsJob& job = call_.job;
    const Matrix dy = k < 0 ? call_.logits() : call_.copy(k);
    void* out = k < 0 ? chunk_of(d_base_, job.D, 0) : chunk_of(d_deltas_, job.K * job.D, k * job.D);
    if (dtype_of(k < 0 ? *d_base_ : *d_deltas_, "a gradient") == Dtype::f32) {
      const Matrix direct{static_cast<float*>(out), job.tokens, job.D, k < 0 ? job.D : job.K * job.D, 1};
      gemm(direct, dy.transposed(), call_.rows_of_hidden(), k >= 0 && adds_deltas_);
      return;
    }
    MixJob weights = call_.chunk_weights();
    const Matrix product = call_.panel(job.D);
    gemm(product, dy.transposed(), call_.rows_of_hidden(), false);
    const Segment all{0, job.M, 0};
    weights.copies = k < 0 ? 0 : 1;
    void *d_base = k < 0 ? out : nullptr, *d_deltas = k < 0 ? nullptr : out;
    run_spread({product.data, &all, 1, job.tokens, job.D, 0, weights, d_base, d_deltas, false, nullptr, past_caches()});
  }

  LogprobCall& call_;
  const std::optional<Tensor>&d_base_, &d_deltas_, &d_c_, &d_bias_, &d_bias_deltas_;
  const bool adds_deltas_;
  std::vector<double> d_c_rows_, d_c_SK_;
  std::vector<float> bias_, bias_deltas_;
  SumsJob sums_{};
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
  RowsJob& job = call.job;
  if (adds_deltas) main_grad_floats(*d_deltas, call.args.weights.N, job.K, job.D);
  for (const std::optional<Tensor>* gradient : {&d_base, &d_deltas, &d_c, &d_bias, &d_bias_deltas}) {
    if (!*gradient || (gradient == &d_deltas && adds_deltas)) continue;
    make_pages(**gradient);
    if (job.M > 0) continue;
    std::memset((*gradient)->mutable_data_ptr(), 0, (*gradient)->numel() * (*gradient)->element_size());
  }
  if (job.M == 0) return;
  const std::vector<float> normalizers = call.gather(normalizer, 2), d_logprobs = call.gather(d_logprob, 1);
  std::vector<float> entropies, d_entropies;
  if (d_entropy) entropies = call.gather(*entropy, 1), d_entropies = call.gather(*d_entropy, 1);
  job.normalizer = normalizers.data();
  job.d_logprob = d_logprobs.data();
  job.entropy = entropies.data();
  job.d_entropy = d_entropy ? d_entropies.data() : nullptr;
  const bool in_place = d_hidden && call.keeps_order() && dtype_of(*d_hidden, "d_hidden") == Dtype::f32;
  const Scratch sorted = d_hidden && !in_place ? Scratch(job.M * job.D) : Scratch();
  if (sorted.get()) std::fill_n(sorted.get(), job.M * job.D, 0.0f);
  float* gradient = in_place ? static_cast<float*>(d_hidden->mutable_data_ptr()) : sorted.get();
  Gradients gradients(call, d_base, d_deltas, d_c, d_bias, d_bias_deltas, adds_deltas);
  const bool trains_head = d_base || d_deltas || d_c || d_bias || d_bias_deltas;
  for (int64_t first = 0; first < call.args.weights.N; first += call.chunk) {
    call.begin_chunk(first, std::min(call.chunk, call.args.weights.N - first));
    call.process_rows(logprob_kernels_in_use().backward, trains_head ? gradients.sums() : nullptr, gradient);
    if (trains_head) gradients.add_chunk();
  }
  gradients.finish();
  if (sorted.get()) call.scatter_rows(sorted.get(), *d_hidden);
}

}  // namespace clp::logprob
