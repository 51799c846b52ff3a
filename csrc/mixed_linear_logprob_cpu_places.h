// Places of a chunk of logits, a vector of them at a time: the online softmax, its entropy, and their gradients. See
// mixed_linear_logprob_cpu.h.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_logprob_cpu_math.h.

typedef double VecDouble __attribute__((vector_size(kWidth * 8)));

// Tokens whose terms are added in float32 before float64 takes them.
constexpr int64_t kSumTokens = 32;

CLP_INLINE VecInt load(const int32_t* p) {
  VecInt v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

CLP_INLINE void add(double* sums, VecDouble terms) {
  VecDouble sum;
  __builtin_memcpy(&sum, sums, sizeof(sum));
  sum += terms;
  __builtin_memcpy(sums, &sum, sizeof(sum));
}

CLP_INLINE VecDouble widened(Vec v) { return __builtin_convertvector(v, VecDouble); }

// Where a vector of places begins in an array laid out as the logits: at its first token, the next `panel` further on.
CLP_INLINE int64_t first_of(const LogitsJob& job, int64_t place) {
  return place / job.panel * job.capacity * job.panel + place % job.panel;
}

// Calls body(place) for each vector of the units [begin, end).
template <typename Body>
CLP_INLINE void for_places(int64_t begin, int64_t end, const Body& body) {
  for (int64_t place = begin * kLanes; place < end * kLanes; place += kWidth) body(place);
}

// The logits of token v from the parts that the products left at `at` floats.
CLP_INLINE Vec logits_of(const LogitsJob& job, int64_t place, int64_t v, int64_t at) {
  Vec y = job.has_base ? load(job.logits + at) : splat(0.0f);
  const int64_t token = job.first_token + v;
  for (int64_t k = 0; job.copies && k < job.K; k++) {
    y += load(job.c + k * job.places + place) * load(job.copies + k * job.size() + at);
  }
  for (int64_t k = 0; job.bias_deltas && k < job.K; k++) {
    y += load(job.c + k * job.places + place) * job.bias_deltas[token * job.K + k];
  }
  if (job.bias) y += job.bias[token];
  y *= job.scale;
  return job.cap != 0.0f ? tanh(y) * job.cap : y;
}

// The derivative of a capped logit by scale * y: tanh'.
CLP_INLINE Vec cap_slope(Vec logit, float cap) {
  const Vec bent = logit / cap;
  return 1.0f - bent * bent;
}

// The places' sums in units of exp(-max) for a larger max.
static void raise_max(const LogitsJob& job, int64_t place, Vec largest) {
  const Vec before = load(job.states.max + place), max = largest > before ? largest : before;
  const Vec ratios = exp(before - max);
  for (int i = 0; i < kWidth; i++) {
    double &sum = job.states.sum[place + i], &weighted = job.states.weighted[place + i];
    if (!(max[i] > before[i]) || !(sum > 0.0)) continue;
    const float ratio = ratios[i];
    weighted = ratio * (weighted + ((double)before[i] - max[i]) * sum);
    sum *= ratio;
    if (!job.gradient || job.rows[place + i] < 0) continue;
    float* gradient = job.gradient + job.rows[place + i] * job.D;
    for (int64_t d = 0; d < job.D; d++) gradient[d] *= ratio;
  }
  store(job.states.max + place, max);
}

static void forward_places(const LogitsJob& job, int64_t place) {
  const VecInt target = load(job.targets + place) - (int32_t)job.first_token;
  const int64_t first = first_of(job, place);
  Vec largest = splat(-__builtin_inff()), of_target = load(job.states.target + place);
  for (int64_t v = 0, at = first; v < job.tokens; v++, at += job.panel) {
    const Vec logit = logits_of(job, place, v, at);
    largest = logit > largest ? logit : largest;
    of_target = target == (int32_t)v ? logit : of_target;
    store(job.logits + at, logit);
  }
  store(job.states.target + place, of_target);
  raise_max(job, place, largest);
  const Vec max = load(job.states.max + place);
  for (int64_t v = 0, at = first; v < job.tokens;) {
    Vec sum = splat(0.0f), weighted = splat(0.0f);
    for (const int64_t end = v + kSumTokens < job.tokens ? v + kSumTokens : job.tokens; v < end; v++, at += job.panel) {
      const Vec logit = load(job.logits + at), below = logit - max, value = exp(below);
      sum += value;
      if (job.needs_weighted) weighted += value == 0.0f ? splat(0.0f) : value * below;
      if (job.gradient) store(job.logits + at, job.cap != 0.0f ? value * cap_slope(logit, job.cap) : value);
    }
    add(job.states.sum + place, widened(sum));
    if (job.needs_weighted) add(job.states.weighted + place, widened(weighted));
  }
}

static void forward(const LogitsJob& job, int64_t begin, int64_t end) {
  for_places(begin, end, [&](int64_t place) { forward_places(job, place); });
}

// dy = slope tanh' (d_logprob (onehot - p) - d_entropy p (log p + entropy))
static void backward_places(const LogitsJob& job, int64_t place) {
  const VecInt target = load(job.targets + place) - (int32_t)job.first_token, is_row = load(job.rows + place) >= 0;
  const Vec max = load(job.max + place), log_sum = load(job.log_sum + place), d_logprob = load(job.d_logprob + place);
  const Vec entropy = job.d_entropy ? load(job.entropy + place) : splat(0.0f);
  const Vec d_entropy = job.d_entropy ? load(job.d_entropy + place) : splat(0.0f);
  for (int64_t v = 0, at = first_of(job, place); v < job.tokens; v++, at += job.panel) {
    const Vec logit = logits_of(job, place, v, at), logprob = (logit - max) - log_sum, p = exp(logprob);
    Vec dy = d_logprob * ((target == (int32_t)v ? splat(1.0f) : splat(0.0f)) - p);
    if (job.d_entropy) dy -= p == 0.0f ? splat(0.0f) : d_entropy * p * (logprob + entropy);
    if (job.cap != 0.0f) dy *= cap_slope(logit, job.cap);
    store(job.logits + at, is_row ? dy * job.slope : splat(0.0f));  // sum_tokens adds all places
  }
}

static void backward(const LogitsJob& job, int64_t begin, int64_t end) {
  for_places(begin, end, [&](int64_t place) { backward_places(job, place); });
}

static void weigh(const LogitsJob& job, int64_t k, float* out, int64_t begin, int64_t end) {
  for_places(begin, end, [&](int64_t place) {
    const Vec c = load(job.c + k * job.places + place);
    for (int64_t v = 0, at = first_of(job, place); v < job.tokens; v++, at += job.panel) {
      store(out + at, c * load(job.logits + at));
    }
  });
}

// In float64: one row's target makes most of a token's sum, and every float32 addition to it would round.
static void sum_tokens(const SumsJob& job, int64_t token_begin, int64_t token_end) {
  const LogitsJob& logits = *job.logits;
  for (int64_t v = token_begin; v < token_end; v++) {
    for (int64_t k = -1; k < (job.d_bias_deltas ? logits.K : 0); k++) {
      if (k < 0 && !job.d_bias) continue;
      VecDouble sum = {};
      for_places(0, logits.places / kLanes, [&](int64_t place) {
        const Vec dy = load(logits.logits + first_of(logits, place) + v * logits.panel);
        sum += widened(k < 0 ? dy : load(logits.c + k * logits.places + place) * dy);
      });
      double total = 0.0;
      for (int i = 0; i < kWidth; i++) total += sum[i];
      (k < 0 ? job.d_bias[v] : job.d_bias_deltas[v * logits.K + k]) = (float)total;
    }
  }
}

static void sum_places(const SumsJob& job, int64_t begin, int64_t end) {
  const LogitsJob& logits = *job.logits;
  for_places(begin, end, [&](int64_t place) {
    for (int64_t k = 0; k < logits.K; k++) {
      const float* copy = logits.copies ? logits.copies + k * logits.size() : nullptr;
      const float* bias = logits.bias_deltas ? logits.bias_deltas + logits.first_token * logits.K + k : nullptr;
      VecDouble total = {};
      for (int64_t v = 0, at = first_of(logits, place); v < logits.tokens; v++, at += logits.panel) {
        Vec term = copy ? load(copy + at) : splat(0.0f);
        if (bias) term += bias[v * logits.K];
        total += widened(load(logits.logits + at) * term);
      }
      add(job.d_c + k * logits.places + place, total);
    }
  });
}

static void evaluate(const float* x, bool is_tanh, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += kWidth) store(out + i, is_tanh ? tanh(load(x + i)) : exp(load(x + i)));
}
