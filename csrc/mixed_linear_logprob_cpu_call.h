// One call of mixed_linear_logprob on the CPU: its rows and weights in normal form, and the products of a chunk.
#pragma once

#include <algorithm>
#include <vector>

#include "mixed_linear_cpu_ops.h"
#include "mixed_linear_logprob_cpu.h"

namespace clp::logprob {

const LogprobKernels& logprob_kernels_in_use();

struct LogprobTensors {
  const Tensor& hidden;
  const std::optional<Tensor>& base;
  const Tensor &deltas, &c, &row_map;
  const std::optional<Tensor>&bias, &bias_deltas;
  const Tensor& targets;
  int64_t ignore_index;
  double temperature, logit_scale;
  std::optional<double> softcap;
};

typedef void (*RowsKernel)(const RowsJob& job, int64_t row_begin, int64_t row_end);

class LogprobCall {
 public:
  explicit LogprobCall(const LogprobTensors& tensors);
  LogprobCall(const LogprobCall&) = delete;

  // Makes [first, first + tokens) the chunk that the functions below work on.
  void begin_chunk(int64_t first, int64_t tokens);

  // Products with the chunk's weights, `kernel` on their rows, `sums` of the result where given, and the product of the
  // result with the weights, added to gradient [M, D] where given.
  void process_rows(RowsKernel kernel, const SumsJob* sums, float* gradient);

  // Writes values [M, D] in the order of `rows` to out [.., D]; rows without a target are left as they are.
  void scatter_rows(const float* values, const Tensor& out) const;

  int64_t row_of(int64_t m) const { return rows_.empty() ? m : rows_[m]; }
  bool keeps_order() const { return rows_.empty(); }
  std::vector<float> gather(const Tensor& values, int64_t width) const;

  // The chunk's weights as a MixJob; `at` counts elements from its first token in gradients of that shape.
  MixJob chunk_weights() const;
  Matrix panel(int64_t columns) const { return {panel_.get(), job.tokens, columns, columns, 1}; }
  Matrix logits() const { return {job.logits, job.M, job.tokens, job.stride, 1}; }
  // c_k times logits' gradients, after process_rows, where rows are not mixed by segment.
  Matrix copy(int64_t k) const { return {copies_.get() + k * job.M * job.stride, job.M, job.tokens, job.stride, 1}; }
  Matrix rows_of_hidden() const { return read_only(x_, job.M, job.D, job.D, 1); }

  MixedLinearArgs args;
  std::vector<Segment> segments;
  RowsJob job{};
  bool mixes;            // a panel of the mix for each segment; else one product for each stream of weights
  int64_t chunk;         // tokens of a chunk
  int64_t panel_floats;

 private:
  void plan(const LogprobTensors& tensors);
  void choose_sizes();
  void process_segments(RowsKernel kernel, float* gradient);
  void process_streams(RowsKernel kernel, const SumsJob* sums, float* gradient);
  void run_rows(RowsKernel kernel, int64_t begin, int64_t end) const;
  void run_sums(const SumsJob& sums) const;
  Matrix mixed(const float* c, int64_t copies, int64_t first_copy, bool has_base) const;
  Matrix stream(int64_t k) const;

  std::vector<int32_t> rows_;  // row here -> row of hidden; empty: the same
  std::vector<int32_t> weighting_;
  std::vector<int64_t> targets_;
  std::optional<Tensor> hidden_;
  Scratch staged_, panel_, logits_, copies_;
  const float* x_ = nullptr;
  std::vector<float> bias_, bias_deltas_;
  std::vector<float> chunk_bias_, chunk_bias_deltas_;
};

void mixed_linear_logprob_cpu_fwd(const Tensor& hidden, const std::optional<Tensor>& base, const Tensor& deltas,
                                  const Tensor& c, const Tensor& row_map, const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& bias_deltas, const Tensor& targets, int64_t ignore_index,
                                  double temperature, double logit_scale, std::optional<double> softcap,
                                  const Tensor& logprob, const std::optional<Tensor>& entropy, const Tensor& normalizer,
                                  const std::optional<Tensor>& formed);

void mixed_linear_logprob_cpu_backward(
    const Tensor& hidden, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
    const Tensor& row_map, const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_deltas,
    const Tensor& targets, int64_t ignore_index, double temperature, double logit_scale, std::optional<double> softcap,
    const Tensor& normalizer, const std::optional<Tensor>& entropy, const Tensor& d_logprob,
    const std::optional<Tensor>& d_entropy, const std::optional<Tensor>& d_hidden, const std::optional<Tensor>& d_base,
    const std::optional<Tensor>& d_deltas, const std::optional<Tensor>& d_c, const std::optional<Tensor>& d_bias,
    const std::optional<Tensor>& d_bias_deltas, bool adds_deltas);

Tensor logprob_cpu_function(const Tensor& x, bool is_tanh);

}  // namespace clp::logprob
