// One call of mixed_linear_logprob on the CPU: its rows and weights in normal form, its chunks of the vocabulary, and
// the products that each chunk has with the rows.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
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

// Where a chunk's gradients of the weights go; null: not wanted.
struct ChunkGradients {
  void* base;                // [tokens, D]
  void* deltas;              // [tokens, K, D]; float32, which is added to, where adds_deltas
  bool adds_deltas;
  double* d_c;               // [S, K], added to
  bool past_caches;          // what is not added to is not read soon

  bool is_none() const { return !base && !deltas && !d_c; }
};

// What happens to logits between a chunk's products.
struct Process {
  std::function<void(int64_t begin, int64_t end)> places;  // units of kLanes: they become what is spread
  std::function<void()> sums;                              // of all of them
};

// The products of a chunk, weights its own.
class Products {
 public:
  virtual ~Products() = default;
  // Makes the head's output, or the parts that LogitsJob sums; has them processed; adds to gradient [M, D], where
  // given, the weights times what they became, and writes the weights' own gradients.
  virtual void run(const Weights& weights, const Process& process, float* gradient,
                   const ChunkGradients& gradients) = 0;
};

// The rows that have a target, sorted by weighting: the order of work.
struct KeptRows {
  std::vector<int32_t> order;  // order of work -> row of hidden; empty: all, as they are
  std::vector<int32_t> targets;
  Plan plan;                   // its own order is spent

  int64_t size() const { return static_cast<int64_t>(targets.size()); }
  int64_t row(int64_t m) const { return order.empty() ? m : order[m]; }
};

class LogprobCall {
 public:
  explicit LogprobCall(const LogprobTensors& tensors);
  LogprobCall(const LogprobCall&) = delete;

  // Runs body(weights) for one chunk of the vocabulary after the other.
  template <typename Body>
  void for_chunks(const Body& body) {
    const int64_t V = args.weights.N;
    for (int64_t first = 0; first < V && kept.size() > 0; first += job.capacity) {
      job.first_token = first;
      job.tokens = std::min(job.capacity, V - first);
      body(chunk_weights());
    }
  }

  typedef void (*PlacesKernel)(const LogitsJob& job, int64_t begin, int64_t end);
  Process process(PlacesKernel kernel, std::function<void()> sums) const;

  // Writes values [M, D] in the order of work to rows of out; those without a target are left as they are.
  void scatter_rows(const float* values, const Tensor& out) const;
  // A column of [rows, width] floats, at each row's place; zero past the rows.
  std::vector<float> gather(const Tensor& values, int64_t width, int64_t column) const;

  // Rows of hidden in the order of work, as float32: columns in panels of `width`; or as they lie, else in `staged`.
  void stage_hidden(int64_t width, float* out) const;
  Matrix rows_of_hidden(Scratch& staged) const;

  MixedLinearArgs args;
  KeptRows kept;
  Mixes mixes;                 // of each segment
  Array hidden;                // [rows, D]
  std::vector<int32_t> places; // order of work -> place
  LogitsJob job{};
  std::unique_ptr<Products> products;

 private:
  enum class Form { streams, panels, fused };
  Form choose_form() const;
  void place_rows(Form form);
  void list_places(Form form);
  Weights chunk_weights() const;

  std::optional<Tensor> hidden_;
  std::vector<int32_t> targets_, rows_;
  std::vector<float> c_, bias_, bias_deltas_;
  Scratch logits_, copies_;
};

// One product of all rows with each stream of weights; with each segment's mix in a panel; with mixes that are made as
// the products go, for rows in the places that RowBlocks gives them.
std::unique_ptr<Products> stream_products(const LogprobCall& call);
std::unique_ptr<Products> panel_products(const LogprobCall& call);
std::unique_ptr<Products> fused_products(const LogprobCall& call);

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
