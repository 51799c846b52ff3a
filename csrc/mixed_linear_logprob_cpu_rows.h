// Rows of a chunk of logits: the online softmax, its entropy, and their gradients. See mixed_linear_logprob_cpu.h.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_logprob_cpu_math.h.

// The head's output of row m, from the parts that the products left, becomes logits; returns them.
static float* make_logits(const RowsJob& job, int64_t m) {
  float* row = job.logits + m * job.stride;
  const float* c = job.c + job.weighting[m] * job.K;
  for (int64_t i = 0; i < job.stride; i += kWidth) {
    Vec y = job.has_base ? load(row + i) : splat(0.0f);
    for (int64_t k = 0; job.copies && k < job.K; k++) y += c[k] * load(job.copies + (k * job.M + m) * job.stride + i);
    for (int64_t k = 0; job.bias_deltas && k < job.K; k++) y += c[k] * load(job.bias_deltas + k * job.stride + i);
    if (job.bias) y += load(job.bias + i);
    y *= job.scale;
    store(row + i, job.cap != 0.0f ? tanh(y) * job.cap : y);
  }
  for (int64_t i = job.tokens; i < job.stride; i++) row[i] = -__builtin_inff();
  return row;
}

// The derivative of a capped logit by scale * y: tanh'.
CLP_INLINE Vec cap_slope(Vec logit, float cap) {
  const Vec bent = logit / cap;
  return 1.0f - bent * bent;
}

// The row's sums in units of exp(-max) for a larger max.
static void raise_max(const RowsJob& job, int64_t m, float max) {
  RowState& state = job.states[m];
  if (!(max > state.max)) return;
  const float ratio = exp_one(state.max - max);
  if (state.sum > 0.0) {
    state.weighted = ratio * (state.weighted + ((double)state.max - max) * state.sum);
    state.sum *= ratio;
    float* gradient = job.gradient + m * job.D;
    for (int64_t d = 0; job.gradient && d < job.D; d++) gradient[d] *= ratio;
  }
  state.max = max;
}

static void forward(const RowsJob& job, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; m++) {
    float* row = make_logits(job, m);
    RowState& state = job.states[m];
    const int64_t target = job.targets[m] - job.first_token;
    if (target >= 0 && target < job.tokens) {
      const float bent = job.cap != 0.0f ? row[target] / job.cap : 0.0f;
      state.target = row[target];
      state.target_slope = 1.0f - bent * bent;
    }
    Vec largest = load(row);
    for (int64_t i = kWidth; i < job.stride; i += kWidth) {
      const Vec logit = load(row + i);
      largest = logit > largest ? logit : largest;
    }
    raise_max(job, m, max_lane(largest));
    Vec sum = splat(0.0f), weighted = splat(0.0f);
    for (int64_t i = 0; i < job.stride; i += kWidth) {
      const Vec logit = load(row + i), below = logit - state.max, value = exp(below);
      sum += value;
      if (job.needs_weighted) weighted += value == 0.0f ? splat(0.0f) : value * below;
      if (job.gradient) store(row + i, job.cap != 0.0f ? value * cap_slope(logit, job.cap) : value);
    }
    state.sum += sum_lanes(sum);
    state.weighted += sum_lanes(weighted);
    for (int64_t i = job.tokens; job.gradient && i < job.stride; i++) row[i] = 0.0f;
  }
}

// dy = slope tanh' (d_logprob (onehot - p) - d_entropy p (log p + entropy))
static void backward(const RowsJob& job, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; m++) {
    float* row = make_logits(job, m);
    const float max = job.normalizer[2 * m], log_sum = job.normalizer[2 * m + 1];
    const float d_logprob = job.d_logprob[m], d_entropy = job.d_entropy ? job.d_entropy[m] : 0.0f;
    const float entropy = job.d_entropy ? job.entropy[m] : 0.0f;
    const int64_t target = job.targets[m] - job.first_token;
    const bool has_target = target >= 0 && target < job.tokens;
    const float bent = job.cap != 0.0f && has_target ? row[target] / job.cap : 0.0f;
    for (int64_t i = 0; i < job.stride; i += kWidth) {
      const Vec logit = load(row + i), logprob = (logit - max) - log_sum, p = exp(logprob);
      Vec dy = p * -d_logprob;
      if (job.d_entropy) dy -= p == 0.0f ? splat(0.0f) : d_entropy * p * (logprob + entropy);
      if (job.cap != 0.0f) dy *= cap_slope(logit, job.cap);
      store(row + i, dy * job.slope);
    }
    if (has_target) row[target] += d_logprob * job.slope * (1.0f - bent * bent);
    for (int64_t i = job.tokens; i < job.stride; i++) row[i] = 0.0f;
  }
}

static void weight_rows(const RowsJob& job, int64_t k, float* out, int64_t row_begin, int64_t row_end) {
  for (int64_t m = row_begin; m < row_end; m++) {
    const float c = job.c[job.weighting[m] * job.K + k];
    for (int64_t i = m * job.stride; i < (m + 1) * job.stride; i += kWidth) store(out + i, c * load(job.logits + i));
  }
}

// In float64: one row's target makes most of a token's sum, and every float32 addition to it would round.
static void sum_columns(const SumsJob& job, int64_t begin, int64_t end) {
  typedef double VecDouble __attribute__((vector_size(kWidth * 8)));
  const RowsJob& rows = *job.rows;
  for (int64_t i = begin * kLogitLanes; i < end * kLogitLanes; i += kWidth) {
    for (int64_t k = -1; k < (job.d_bias_deltas ? rows.K : 0); k++) {
      float* out = k < 0 ? job.d_bias : job.d_bias_deltas + k * rows.stride;
      if (!out) continue;
      VecDouble sum = {};
      for (int64_t m = 0; m < rows.M; m++) {
        const Vec dy = load(job.dy + m * rows.stride + i);
        sum += __builtin_convertvector(k < 0 ? dy : rows.c[rows.weighting[m] * rows.K + k] * dy, VecDouble);
      }
      store(out + i, __builtin_convertvector(sum, Vec));
    }
  }
}

static void sum_rows(const SumsJob& job, int64_t row_begin, int64_t row_end) {
  const RowsJob& rows = *job.rows;
  for (int64_t m = row_begin; m < row_end; m++) {
    const float* dy = job.dy + m * rows.stride;
    for (int64_t k = 0; k < rows.K; k++) {
      const float* copy = rows.copies ? rows.copies + (k * rows.M + m) * rows.stride : nullptr;
      const float* bias = rows.bias_deltas ? rows.bias_deltas + k * rows.stride : nullptr;
      double total = 0.0;
      // Lanes past the chunk hold nothing in `copies`.
      for (int64_t i = 0; i < rows.tokens; i++) total += dy[i] * ((copy ? copy[i] : 0.0f) + (bias ? bias[i] : 0.0f));
      job.d_c[m * rows.K + k] += total;
    }
  }
}

static void evaluate(const float* x, bool is_tanh, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += kWidth) store(out + i, is_tanh ? tanh(load(x + i)) : exp(load(x + i)));
}
