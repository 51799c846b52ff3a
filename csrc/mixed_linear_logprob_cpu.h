// Between the driver of mixed_linear_logprob on the CPU (checks, chunks, products) and its kernels (one set per
// instruction set): what happens to a chunk of weights or logits between two products. The products are torch's.
//
// Letters: m rows (those that have a target, sorted by weighting), d in, v tokens of the vocabulary, k copies,
// s weightings.
// No standard header with inline functions, for the reason that mixed_linear_cpu.h gives.
#pragma once

#include "mixed_linear_cpu.h"

namespace clp::logprob {

// Rows of logits are a multiple of this many floats apart: no kernel has a tail. Lanes past the chunk hold -inf.
constexpr int64_t kLogitLanes = 16;

// panel[v, :] = base[v] + sum_k c[k] delta[v, k], in float32.
struct MixJob {
  const void* base;       // of the chunk's first token, [tokens, D], or null
  const void* deltas;     // the same, [tokens, K, D]
  Dtype base_dtype, deltas_dtype;
  int64_t copies, K, D;   // the first `copies` of K are mixed
  const float* c;
  float* panel;
};

// What a row knows of the tokens seen so far.
struct RowState {
  float max;              // largest logit
  float target;           // logit of the target
  float target_slope;     // its derivative by the head's output, without slope
  double sum;             // of exp(logit - max)
  double weighted;        // of exp(logit - max) * (logit - max)
};

// Logits of a chunk in place: rows hold the head's output, or the base's part of it, and become logits' gradients.
struct RowsJob {
  float* logits;          // [M, stride]
  const float* copies;    // [K, M, stride]: products with each copy that are still to be weighted, or null
  bool has_base;          // false: `logits` holds nothing yet
  int64_t M, stride, tokens, first_token;
  const float* bias;         // [stride] or null
  const float* bias_deltas;  // [K, stride] or null
  const float* c;            // [S, K]
  const int32_t* weighting;  // [M]
  int64_t K;
  float scale, cap, slope;   // logit = cap ? cap * tanh(scale * y) : scale * y; slope: its derivative at tanh' = 1
  const int64_t* targets;    // [M]
  // Forward.
  RowState* states;          // [M]
  bool needs_weighted;
  float* gradient;           // [M, D], kept in units of exp(-max), or null: logits become exp(logit - max) tanh'
  int64_t D;
  // Backward: logits become the gradient of the head's output.
  const float* normalizer;   // [M, 2]: max, log of sum
  const float* entropy;      // [M], with d_entropy
  const float* d_logprob;    // [M]
  const float* d_entropy;    // [M] or null
};

// gradient[m] = slope * (target_slope W[target] - gradient[m] / sum), W[target] the row's own mix.
struct FinishJob {
  MixJob mix;                // of the whole vocabulary; c and panel are set for each row
  const RowsJob* rows;
  float* row;                // [D] scratch of one thread
};

// From G_s = dy_s^T x_s, columns [d0, d0 + columns): d_delta[v, k] = sum_s c[s, k] G_s[v], d_base[v] = sum_s G_s[v] and
// d_c[v, s, k] += <delta[v, k], G_s[v]>.
struct SpreadJob {
  const float* products;     // [num_segments, tokens, columns]
  const Segment* segments;
  int64_t num_segments, tokens, columns, d0;
  MixJob weights;            // of the chunk; its c is [S, K]
  void* d_base;              // of the chunk, or null
  void* d_deltas;            // of the chunk, or null
  bool adds_deltas;          // d_deltas is float32 and added to; else it has the deltas' dtype and is written
  double* d_c;               // [tokens, num_segments, K] or null
  bool past_caches;          // gradients that are not added to are not read soon
};

// Sums over a chunk of the gradient dy of the head's output.
struct SumsJob {
  const float* dy;           // [M, stride]
  const RowsJob* rows;
  float* d_bias;             // [stride] or null
  float* d_bias_deltas;      // [K, stride] or null
  double* d_c;               // [M, K], added to: <dy, copies + bias_deltas>; or null
};

struct LogprobKernels {
  void (*mix)(const MixJob& job, int64_t token_begin, int64_t token_end);
  void (*forward)(const RowsJob& job, int64_t row_begin, int64_t row_end);
  void (*backward)(const RowsJob& job, int64_t row_begin, int64_t row_end);
  void (*finish)(const FinishJob& job, int64_t row_begin, int64_t row_end);
  void (*spread)(const SpreadJob& job, int64_t token_begin, int64_t token_end);
  // Of vectors of kLogitLanes columns.
  void (*sum_columns)(const SumsJob& job, int64_t begin, int64_t end);
  void (*sum_rows)(const SumsJob& job, int64_t row_begin, int64_t row_end);
  // out[m] = c[m, k] * job.logits[m]
  void (*weight_rows)(const RowsJob& job, int64_t k, float* out, int64_t row_begin, int64_t row_end);
  // exp(x) or tanh(x), for tests; size is a multiple of kLogitLanes.
  void (*evaluate)(const float* x, bool is_tanh, int64_t size, float* out);
};

extern const LogprobKernels logprob_kernels_portable;
#if defined(__x86_64__)
extern const LogprobKernels logprob_kernels_avx2;
extern const LogprobKernels logprob_kernels_avx512;
#endif

}  // namespace clp::logprob
