#include "mixed_linear_logprob_cpu_call.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu_features.h"

namespace clp::logprob {

namespace {

using torch::headeronly::ScalarType;

// Floats of a panel of weights, 4 MiB: for D = 2048 a chunk of 512 tokens, whose products run as fast as larger ones.
constexpr int64_t kPanelFloats = 1 << 20;
constexpr int64_t kSmallestChunk = 64, kLargestChunk = 1024;

// Mixing one stream of weights once costs as much as the product of so many rows with it.
constexpr int64_t kRowsOfMix = 8;

const void* offset(const void* values, Dtype dtype, int64_t elements) {
  if (values == nullptr) return nullptr;
  return static_cast<const char*>(values) + elements * (dtype == Dtype::f32 ? 4 : 2);
}

}  // namespace

const LogprobKernels& logprob_kernels_in_use() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::portable:
      return logprob_kernels_portable;
    case Isa::avx2:
      return logprob_kernels_avx2;
    case Isa::avx512:
    case Isa::avx512_bf16:
    case Isa::amx_bf16:
      return logprob_kernels_avx512;
  }
#endif
  return logprob_kernels_portable;
}

LogprobCall::LogprobCall(const LogprobTensors& t) : args(t.base, t.deltas, t.c, t.row_map) {
  const Weights& w = args.weights;
  bias_ = to_floats(t.bias, "bias", w.N);
  bias_deltas_ = to_floats(t.bias_deltas, "bias_deltas", w.N * w.K);
  plan(t);
  job.D = w.D;
  job.K = w.K;
  job.c = args.c;
  job.has_base = w.base != nullptr;
  job.weighting = weighting_.data();
  job.targets = targets_.data();
  job.slope = static_cast<float>(t.logit_scale / t.temperature);
  job.scale = t.softcap ? static_cast<float>(t.logit_scale / *t.softcap) : job.slope;
  job.cap = t.softcap ? static_cast<float>(*t.softcap / t.temperature) : 0.0f;
  choose_sizes();
}

// Keeps the rows that have a target, sorted by weighting, and stages them as float32 where they are not so already.
void LogprobCall::plan(const LogprobTensors& t) {
  const Weights& w = args.weights;
  const int64_t rows = args.M, D = w.D, V = w.N;
  const Tensor hidden = contiguous_rows(t.hidden, "hidden", rows, D);
  STD_TORCH_CHECK(t.targets.scalar_type() == ScalarType::Long && t.targets.numel() == rows && t.targets.is_contiguous(),
                  "mixed_linear_logprob (cpp): targets must be contiguous int64 [", rows, "]");
  const int64_t* targets = static_cast<const int64_t*>(t.targets.const_data_ptr());
  std::vector<int32_t> weighting;
  for (int64_t row = 0; row < rows; row++) {
    if (targets[row] == t.ignore_index) continue;
    STD_TORCH_CHECK(targets[row] >= 0 && targets[row] < V, "mixed_linear_logprob (cpp): targets[", row, "] is ",
                    targets[row], ", outside [0, ", V, ")");
    rows_.push_back(static_cast<int32_t>(row));
    weighting.push_back(args.row_map[row]);
  }
  job.M = static_cast<int64_t>(rows_.size());
  const Plan by_weighting = plan_rows(weighting.data(), job.M, args.S);
  segments = by_weighting.segments;
  const std::vector<int32_t> kept = rows_;
  for (int64_t m = 0; m < job.M; m++) {
    const int32_t from = by_weighting.order.empty() ? static_cast<int32_t>(m) : by_weighting.order[m];
    rows_[m] = kept[from];
    weighting_.push_back(weighting[from]);
    targets_.push_back(targets[rows_[m]]);
  }
  const Dtype dtype = dtype_of(hidden, "hidden");
  hidden_ = hidden;
  if (job.M == rows && by_weighting.order.empty()) rows_.clear();
  if (keeps_order() && dtype == Dtype::f32) {
    x_ = static_cast<const float*>(hidden.const_data_ptr());
    return;
  }
  staged_ = Scratch(job.M * D);
  const Kernels& kernels = kernels_in_use();
  for (int64_t m = 0; m < job.M; m++) {
    kernels.widen(hidden.const_data_ptr(), dtype, row_of(m) * D, D, 1.0f, staged_.get() + m * D);
  }
  x_ = staged_.get();
}

void LogprobCall::choose_sizes() {
  const Weights& w = args.weights;
  const int64_t streams = w.K + (w.base ? 1 : 0), num_segments = static_cast<int64_t>(segments.size());
  mixes = num_segments * streams * kRowsOfMix < job.M * (streams - 1);
  const int64_t fitting = kPanelFloats / std::max<int64_t>(w.D, 1) / kLogitLanes * kLogitLanes;
  const int64_t all = ceil_div(w.N, kLogitLanes) * kLogitLanes;
  chunk = std::min(std::clamp(fitting, kSmallestChunk, kLargestChunk), all);
  job.stride = chunk;
  // Also the products G_s of backward: all segments' of at least kSmallestChunk columns.
  panel_floats = std::max(chunk * w.D, mixes ? num_segments * chunk * std::min(w.D, kSmallestChunk) : 0);
  if (job.M == 0) return;
  panel_ = Scratch(panel_floats);
  logits_ = Scratch(job.M * job.stride);
  job.logits = logits_.get();
  if (!mixes) copies_ = Scratch(w.K * job.M * job.stride);
  if (mixes) job.has_base = true;  // the mix is one product
  job.copies = copies_.get();
  if (!bias_.empty()) chunk_bias_.resize(job.stride);
  if (!bias_deltas_.empty()) chunk_bias_deltas_.resize(w.K * job.stride);
}

void LogprobCall::begin_chunk(int64_t first, int64_t tokens) {
  job.first_token = first;
  job.tokens = tokens;
  const int64_t K = job.K;
  for (int64_t v = 0; v < tokens; v++) {
    if (!bias_.empty()) chunk_bias_[v] = bias_[first + v];
    for (int64_t k = 0; !bias_deltas_.empty() && k < K; k++) {
      chunk_bias_deltas_[k * job.stride + v] = bias_deltas_[(first + v) * K + k];
    }
  }
  job.bias = !bias_.empty() ? chunk_bias_.data() : nullptr;
  job.bias_deltas = !bias_deltas_.empty() ? chunk_bias_deltas_.data() : nullptr;
}

MixJob LogprobCall::chunk_weights() const {
  const Weights& w = args.weights;
  const int64_t first = job.first_token;
  return {offset(w.base, w.base_dtype, first * w.D), offset(w.deltas, w.deltas_dtype, first * w.K * w.D),
          w.base_dtype, w.deltas_dtype, w.K, w.K, w.D, nullptr, panel_.get()};
}

// The chunk's base where has_base, and `copies` copies from first_copy on times c, in the panel.
Matrix LogprobCall::mixed(const float* c, int64_t copies, int64_t first_copy, bool has_base) const {
  MixJob mix = chunk_weights();
  if (!has_base) mix.base = nullptr;
  mix.deltas = offset(mix.deltas, mix.deltas_dtype, first_copy * mix.D);
  mix.copies = copies;
  mix.c = c;
  const LogprobKernels& kernels = logprob_kernels_in_use();
  parallel(job.tokens, mix.D * (copies + 1), [&](int64_t begin, int64_t end) { kernels.mix(mix, begin, end); });
  return panel(mix.D);
}

// The chunk of one stream of weights, the base for k = -1: where it lies, or converted in the panel.
Matrix LogprobCall::stream(int64_t k) const {
  static const float one = 1.0f;
  const MixJob w = chunk_weights();
  if (k < 0 && w.base_dtype == Dtype::f32) {
    return {static_cast<float*>(const_cast<void*>(w.base)), job.tokens, w.D, w.D, 1};
  }
  if (k >= 0 && w.deltas_dtype == Dtype::f32) {
    return {static_cast<float*>(const_cast<void*>(w.deltas)) + k * w.D, job.tokens, w.D, w.K * w.D, 1};
  }
  return k < 0 ? mixed(&one, 0, 0, true) : mixed(&one, 1, k, false);
}

void LogprobCall::run_rows(RowsKernel kernel, int64_t begin, int64_t end) const {
  parallel(end - begin, 8 * job.stride,
        [&](int64_t first, int64_t last) { kernel(job, begin + first, begin + last); });
}

void LogprobCall::run_sums(const SumsJob& sums) const {
  const LogprobKernels& kernels = logprob_kernels_in_use();
  if (sums.d_bias || sums.d_bias_deltas) {
    parallel(job.stride / kLogitLanes, job.M * kLogitLanes,
          [&](int64_t begin, int64_t end) { kernels.sum_columns(sums, begin, end); });
  }
  if (sums.d_c && (job.copies || job.bias_deltas)) {
    parallel(job.M, job.stride, [&](int64_t begin, int64_t end) { kernels.sum_rows(sums, begin, end); });
  }
}

void LogprobCall::process_rows(RowsKernel kernel, const SumsJob* sums, float* gradient) {
  if (mixes) {
    process_segments(kernel, gradient);
    if (sums) run_sums(*sums);
  } else {
    process_streams(kernel, sums, gradient);
  }
}

void LogprobCall::process_segments(RowsKernel kernel, float* gradient) {
  for (const Segment& segment : segments) {
    const Matrix weights = mixed(job.c + segment.weighting * job.K, job.K, 0, true);
    const Matrix rows = logits().row_range(segment.begin, segment.end);
    gemm(rows, rows_of_hidden().row_range(segment.begin, segment.end), weights.transposed(), false);
    run_rows(kernel, segment.begin, segment.end);
    if (!gradient) continue;
    const Matrix out{gradient, job.M, job.D, job.D, 1};
    gemm(out.row_range(segment.begin, segment.end), rows, weights, true);
  }
}

void LogprobCall::process_streams(RowsKernel kernel, const SumsJob* sums, float* gradient) {
  const LogprobKernels& kernels = logprob_kernels_in_use();
  if (job.has_base) gemm(logits(), rows_of_hidden(), stream(-1).transposed(), false);
  for (int64_t k = 0; k < job.K; k++) gemm(copy(k), rows_of_hidden(), stream(k).transposed(), false);
  run_rows(kernel, 0, job.M);
  if (sums) run_sums(*sums);
  if (!gradient && !sums) return;
  const Matrix out{gradient, job.M, job.D, job.D, 1};
  if (job.has_base && gradient) gemm(out, logits(), stream(-1), true);
  for (int64_t k = 0; k < job.K; k++) {
    parallel(job.M, job.stride,
          [&](int64_t begin, int64_t end) { kernels.weight_rows(job, k, copy(k).data, begin, end); });
    if (gradient) gemm(out, copy(k), stream(k), true);
  }
}

void LogprobCall::scatter_rows(const float* values, const Tensor& out) const {
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = dtype_of(out, "d_hidden");
  for (int64_t m = 0; m < job.M; m++) {
    kernels.narrow(values + m * job.D, job.D, out.mutable_data_ptr(), dtype, row_of(m) * job.D);
  }
}

std::vector<float> LogprobCall::gather(const Tensor& values, int64_t width) const {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
                      values.numel() == args.M * width,
                  "mixed_linear_logprob (cpp): a value of each row must be contiguous float32 [", args.M, ", ",
                  width, "]");
  const float* data = static_cast<const float*>(values.const_data_ptr());
  std::vector<float> gathered;
  for (int64_t m = 0; m < job.M; m++) {
    const float* row = data + row_of(m) * width;
    gathered.insert(gathered.end(), row, row + width);
  }
  return gathered;
}

}  // namespace clp::logprob
