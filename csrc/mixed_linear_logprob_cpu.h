// Between the driver of mixed_linear_logprob on the CPU (checks, chunks, products) and its kernels (one set per
// instruction set): what happens to a chunk of logits between two products.
//
// Letters: m rows (those that have a target, sorted by weighting), d in, v tokens of the vocabulary, k copies,
// s weightings. A place is where a row's logits lie, side by side with others' in a panel: [panels, capacity, panel].
// No standard header with inline functions, for the reason that mixed_linear_cpu.h gives.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp::logprob {

// Places come in multiples of this many: no kernel has a tail. Those past the rows have coefficients of zero, logits
// that nobody reads, and gradients of zero.
constexpr int64_t kLanes = 16;

// What each place knows of the tokens seen so far.
struct States {
  float* max;             // largest logit
  float* target;          // logit of the target
  double* sum;            // of exp(logit - max)
  double* weighted;       // of exp(logit - max) * (logit - max)
};

// Logits of a chunk in place: they hold the head's output, or the base's part of it, and become logits' gradients.
struct LogitsJob {
  float* logits;             // [places / panel, capacity, panel]
  float* copies;             // K of the same: products with each copy that are still to be weighted, or null
  bool has_base;             // false: `logits` holds nothing yet
  int64_t places, panel, capacity, tokens, first_token;
  const float* bias;         // [V] or null
  const float* bias_deltas;  // [V, K] or null
  const float* c;            // [K, places]
  int64_t K;
  float scale, cap, slope;   // logit = cap ? cap * tanh(scale * y) : scale * y; slope: its derivative at tanh' = 1
  const int32_t* targets;    // [places], -1 past the rows
  const int32_t* rows;       // [places], -1 past the rows
  // Forward.
  States states;
  bool needs_weighted;
  float* gradient;           // [M, D], kept in units of exp(-max), or null: logits become exp(logit - max) tanh'
  int64_t D;
  // Backward: logits become the gradient of the head's output. A value for each place.
  const float *max, *log_sum, *d_logprob;
  const float *entropy, *d_entropy;  // both or null

  int64_t size() const { return places * capacity; }
};

// Sums over a chunk of the gradient dy of the head's output.
struct SumsJob {
  const LogitsJob* logits;
  float* d_bias;             // [tokens] or null
  float* d_bias_deltas;      // [tokens, K] or null
  double* d_c;               // [K, places], added to: <dy, copies + bias_deltas>; or null
};

struct LogprobKernels {
  // Of kLanes places each.
  void (*forward)(const LogitsJob& job, int64_t begin, int64_t end);
  void (*backward)(const LogitsJob& job, int64_t begin, int64_t end);
  void (*sum_tokens)(const SumsJob& job, int64_t token_begin, int64_t token_end);
  void (*sum_places)(const SumsJob& job, int64_t begin, int64_t end);
  // out = c_k logits, laid out as they are
  void (*weigh)(const LogitsJob& job, int64_t k, float* out, int64_t begin, int64_t end);
  // exp(x) or tanh(x), for tests; size is a multiple of kLanes.
  void (*evaluate)(const float* x, bool is_tanh, int64_t size, float* out);
};

extern const LogprobKernels logprob_kernels_portable;
#if defined(__x86_64__)
extern const LogprobKernels logprob_kernels_avx2;
extern const LogprobKernels logprob_kernels_avx512;
#endif

}  // namespace clp::logprob
