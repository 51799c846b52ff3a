#include "mixed_linear_logprob_cpu_call.h"

#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "cpu_features.h"
#include "mixed_linear_cpu_blocks.h"

namespace clp::logprob {

namespace {

using torch::headeronly::ScalarType;

// Tokens of a chunk: whole groups of weights, the same number for 2, 3, 6 or 7 threads. For torch's products, so many
// that a panel of their weights takes 4 MiB.
constexpr int64_t kChunk = 504, kPanelFloats = 1 << 20, kSmallestChunk = 64, kLargestChunk = 1024;

// Mixing one stream of weights once costs as much as the product of so many rows with it.
constexpr int64_t kRowsOfMix = 8;

// Rows of a segment from which torch's product with a panel of its mix is faster than the own one, which mixes as it
// goes. For few rows of one weighting alone it is too, for the panel serves both of a chunk's products, and for many
// about as fast. Forward, with the gradient of hidden, with all gradients, in ms, float32, K = 2, V = 8064, D = 1024,
// two Xeon threads with AVX-512:
//   segments x rows   streams          panels           own
//   1 x 16              6   13   23      5    8   17      6   13   23
//   1 x 256            48   94  170     21   34   69     18   33   61
//   16 x 8             29   58  106     70   92  201     40   78  145
//   4 x 16             17   34   67     19   29   66     12   25   51
//   16 x 128          311  619 1203    172  290  586    122  247  472
//   4 x 256           156  314  579     73  128  263     55  112  231
//   4 x 512           359  730 1257    144  259  573    136  298  632
constexpr int64_t kPanelRows = 384;

const void* offset(const void* values, Dtype dtype, int64_t elements) {
  if (values == nullptr) return nullptr;
  return static_cast<const char*>(values) + elements * (dtype == Dtype::f32 ? 4 : 2);
}

KeptRows keep_rows(const LogprobTensors& t, const MixedLinearArgs& args) {
  const int64_t rows = args.M, V = args.weights.N;
  STD_TORCH_CHECK(V <= std::numeric_limits<int32_t>::max(), "mixed_linear_logprob (cpp): the vocabulary has ", V,
                  " tokens; at most 2^31 - 1 are supported");
  STD_TORCH_CHECK(t.targets.scalar_type() == ScalarType::Long && t.targets.numel() == rows && t.targets.is_contiguous(),
                  "mixed_linear_logprob (cpp): targets must be contiguous int64 [", rows, "]");
  const int64_t* targets = static_cast<const int64_t*>(t.targets.const_data_ptr());
  KeptRows kept;
  std::vector<int32_t> order, weighting;
  for (int64_t row = 0; row < rows; row++) {
    if (targets[row] == t.ignore_index) continue;
    STD_TORCH_CHECK(targets[row] >= 0 && targets[row] < V, "mixed_linear_logprob (cpp): targets[", row, "] is ",
                    targets[row], ", outside [0, ", V, ")");
    order.push_back(static_cast<int32_t>(row));
    weighting.push_back(args.row_map[row]);
  }
  const int64_t M = static_cast<int64_t>(order.size());
  kept.plan = plan_rows(weighting.data(), M, args.S);
  const bool is_moved = M != rows || !kept.plan.order.empty();
  for (int64_t m = 0; m < M; m++) {
    const int32_t row = order[kept.plan.row(m)];
    if (is_moved) kept.order.push_back(row);
    kept.targets.push_back(static_cast<int32_t>(targets[row]));
  }
  kept.plan.order.clear();
  return kept;
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

LogprobCall::LogprobCall(const LogprobTensors& t)
    : args(t.base, t.deltas, t.c, t.row_map),
      kept(keep_rows(t, args)),
      mixes(kept.plan, args.c, args.weights.K, args.weights.base != nullptr),
      hidden_(contiguous_rows(t.hidden, "hidden", args.M, args.weights.D)) {
  const Weights& w = args.weights;
  hidden = array_of(*hidden_, "hidden");
  bias_ = to_floats(t.bias, "bias", w.N);
  bias_deltas_ = to_floats(t.bias_deltas, "bias_deltas", w.N * w.K);
  job.bias = bias_.empty() ? nullptr : bias_.data();
  job.bias_deltas = bias_deltas_.empty() ? nullptr : bias_deltas_.data();
  job.D = w.D;
  job.K = w.K;
  job.slope = static_cast<float>(t.logit_scale / t.temperature);
  job.scale = t.softcap ? static_cast<float>(t.logit_scale / *t.softcap) : job.slope;
  job.cap = t.softcap ? static_cast<float>(*t.softcap / t.temperature) : 0.0f;
  place_rows(choose_form());
}

LogprobCall::Form LogprobCall::choose_form() const {
  const int64_t M = kept.size(), streams = args.weights.K + (args.weights.base ? 1 : 0);
  const int64_t segments = static_cast<int64_t>(kept.plan.segments.size());
  if (streams > 1 && segments == 1) return Form::panels;
  if (segments * streams * kRowsOfMix >= M * (streams - 1)) return Form::streams;
  return M < kPanelRows * segments ? Form::fused : Form::panels;
}

void LogprobCall::list_places(Form form) {
  const std::vector<Segment>& segments = kept.plan.segments;
  if (form == Form::fused) {
    const RowBlocks blocks(segments, kernels_in_use().panel_rows);
    for (const Piece& piece : blocks.pieces) {
      for (int64_t m = 0; m < piece.rows(); m++) places.push_back(static_cast<int32_t>(piece.place + m));
    }
    job.places = blocks.places;
  }
  for (size_t g = 0; form != Form::fused && g < segments.size(); g++) {
    if (form == Form::panels) job.places = ceil_div(job.places, kLanes) * kLanes;
    for (int64_t m = segments[g].begin; m < segments[g].end; m++) places.push_back(static_cast<int32_t>(job.places++));
  }
  job.places = ceil_div(job.places, kLanes) * kLanes;
}

void LogprobCall::place_rows(Form form) {
  const Weights& w = args.weights;
  const std::vector<Segment>& segments = kept.plan.segments;
  const bool is_fused = form == Form::fused;
  list_places(form);
  job.panel = is_fused ? kernels_in_use().panel_rows : job.places;
  const int64_t fitting = kPanelFloats / std::max<int64_t>(w.D, 1) / kLanes * kLanes;
  job.capacity = std::min(is_fused ? kChunk : std::clamp(fitting, kSmallestChunk, kLargestChunk), w.N);
  targets_.assign(job.places, -1);
  rows_.assign(job.places, -1);
  c_.assign(w.K * job.places, 0.0f);
  for (const Segment& segment : segments) {
    for (int64_t m = segment.begin; m < segment.end; m++) {
      targets_[places[m]] = kept.targets[m];
      rows_[places[m]] = static_cast<int32_t>(m);
      for (int64_t k = 0; k < w.K; k++) c_[k * job.places + places[m]] = args.c[segment.weighting * w.K + k];
    }
  }
  job.targets = targets_.data();
  job.rows = rows_.data();
  job.c = c_.data();
  // The products leave places past the rows as they are: what the kernels make of them has to begin with numbers.
  logits_ = Scratch(job.size());
  std::fill_n(logits_.get(), job.size(), 0.0f);
  job.logits = logits_.get();
  job.has_base = form != Form::streams || w.base;
  if (form == Form::streams) {
    copies_ = Scratch(w.K * job.size());
    std::fill_n(copies_.get(), w.K * job.size(), 0.0f);
    job.copies = copies_.get();
  }
  products = is_fused ? fused_products(*this) : form == Form::panels ? panel_products(*this) : stream_products(*this);
}

Weights LogprobCall::chunk_weights() const {
  Weights w = args.weights;
  w.base = offset(w.base, w.base_dtype, job.first_token * w.D);
  w.deltas = offset(w.deltas, w.deltas_dtype, job.first_token * w.K * w.D);
  w.N = job.tokens;
  return w;
}

Process LogprobCall::process(PlacesKernel kernel, std::function<void()> sums) const {
  const auto run = [this, kernel](int64_t first, int64_t last) {
    parallel(last - first, 8 * kLanes * job.tokens,
             [&](int64_t begin, int64_t end) { kernel(job, first + begin, first + end); });
  };
  return {run, std::move(sums)};
}

void LogprobCall::stage_hidden(int64_t width, float* out) const {
  const int32_t* order = kept.order.empty() ? nullptr : kept.order.data();
  const int64_t M = kept.size(), D = job.D;
  parallel(ceil_div(D, std::max<int64_t>(width, 1)), M * width, [&](int64_t begin, int64_t end) {
    kernels_in_use().stage({hidden.data, hidden.dtype, order, 0, M, D, begin * width, std::min(D, end * width), width,
                            nullptr, out + begin * width * M});
  });
}

Matrix LogprobCall::rows_of_hidden(Scratch& staged) const {
  const int64_t M = kept.size(), D = job.D;
  if (hidden.is_float() && kept.order.empty()) return read_only(hidden.floats(), M, D, D, 1);
  staged = Scratch(M * D);
  stage_hidden(D, staged.get());
  return {staged.get(), M, D, D, 1};
}

void LogprobCall::scatter_rows(const float* values, const Tensor& out) const {
  const Dtype dtype = dtype_of(out, "d_hidden");
  for (int64_t m = 0; m < kept.size(); m++) {
    kernels_in_use().narrow(values + m * job.D, job.D, out.mutable_data_ptr(), dtype, kept.row(m) * job.D);
  }
}

std::vector<float> LogprobCall::gather(const Tensor& values, int64_t width, int64_t column) const {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
                      values.numel() == args.M * width,
                  "mixed_linear_logprob (cpp): a value of each row must be contiguous float32 [", args.M, ", ",
                  width, "]");
  const float* data = static_cast<const float*>(values.const_data_ptr());
  std::vector<float> gathered(job.places, 0.0f);
  for (int64_t m = 0; m < kept.size(); m++) gathered[places[m]] = data[kept.row(m) * width + column];
  return gathered;
}

}  // namespace clp::logprob
