// Rows of weights: mixing them for a product, spreading a product over their gradients. See mixed_linear_logprob_cpu.h.
//
// Included once per instruction set, inside that set's namespace, after mixed_linear_cpu_vector.h.

template <typename Base, typename Delta>
static void mix_token(const MixJob& job, int64_t v, const float* c, float* out) {
  const Base* base = job.base ? (const Base*)job.base + v * job.D : nullptr;
  const Delta* deltas = (const Delta*)job.deltas + v * job.K * job.D;
  int64_t d = 0;
  for (; d + kWidth <= job.D; d += kWidth) {
    Vec sum = base ? load(base + d) : splat(0.0f);
    for (int64_t k = 0; k < job.copies; k++) sum += c[k] * load(deltas + k * job.D + d);
    store(out + d, sum);
  }
  for (; d < job.D; d++) {
    float sum = base ? load_one(base + d) : 0.0f;
    for (int64_t k = 0; k < job.copies; k++) sum += c[k] * load_one(deltas + k * job.D + d);
    out[d] = sum;
  }
}

typedef void (*MixToken)(const MixJob&, int64_t, const float*, float*);

template <typename Base, typename Delta>
CLP_INLINE MixToken mix_token_of(const Base*, const Delta*) {
  return mix_token<Base, Delta>;
}

static MixToken mix_token_for(const MixJob& job) {
  MixToken run = nullptr;
  with_types(job.base_dtype, job.deltas_dtype,
             [&](const auto* base, const auto* deltas) { run = mix_token_of(base, deltas); });
  return run;
}

static void mix(const MixJob& job, int64_t token_begin, int64_t token_end) {
  const MixToken run = mix_token_for(job);
  for (int64_t v = token_begin; v < token_end; v++) run(job, v, job.c, job.panel + v * job.D);
}

static void finish(const FinishJob& job, int64_t row_begin, int64_t row_end) {
  const RowsJob& rows = *job.rows;
  const MixToken run = mix_token_for(job.mix);
  for (int64_t m = row_begin; m < row_end; m++) {
    const RowState& state = rows.states[m];
    run(job.mix, rows.targets[m], rows.c + rows.weighting[m] * rows.K, job.row);
    const float of_target = rows.slope * state.target_slope, of_sum = (float)(rows.slope / state.sum);
    float* gradient = rows.gradient + m * rows.D;
    for (int64_t d = 0; d < rows.D; d++) gradient[d] = of_target * job.row[d] - of_sum * gradient[d];
  }
}

// out[i] = sum_s c[s] product_s[i], c null: all one; where `adds`, that is added to out
template <typename Out>
static void weigh_segments(const SpreadJob& job, const float* product, const float* c, Out* out, bool adds) {
  const int64_t step = job.tokens * job.columns;
  const bool past_caches = job.past_caches && !adds && (uintptr_t)out % (kWidth * sizeof(Out)) == 0;
  int64_t i = 0;
  for (; i + kWidth <= job.columns; i += kWidth) {
    Vec sum = adds ? load(out + i) : splat(0.0f);
    for (int64_t g = 0; g < job.num_segments; g++) {
      const Vec value = load(product + g * step + i);
      sum += c ? c[job.segments[g].weighting * job.weights.K] * value : value;
    }
    past_caches ? stream(out + i, sum) : store(out + i, sum);
  }
  for (; i < job.columns; i++) {
    float sum = adds ? load_one(out + i) : 0.0f;
    for (int64_t g = 0; g < job.num_segments; g++) {
      const float value = product[g * step + i];
      sum += c ? c[job.segments[g].weighting * job.weights.K] * value : value;
    }
    store_one(out + i, sum);
  }
}

template <typename Delta>
static double inner_product(const Delta* delta, const float* product, int64_t size) {
  Vec sum = splat(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) sum += load(delta + i) * load(product + i);
  double total = sum_lanes(sum);
  for (; i < size; i++) total += load_one(delta + i) * product[i];
  return total;
}

template <typename Base, typename Delta>
static void spread_token(const SpreadJob& job, const Base*, const Delta*, int64_t v) {
  const MixJob& w = job.weights;
  const float* product = job.products + v * job.columns;
  if (job.d_base) weigh_segments(job, product, nullptr, (Base*)job.d_base + v * w.D + job.d0, false);
  for (int64_t k = 0; k < w.copies; k++) {
    const int64_t at = (v * w.K + k) * w.D + job.d0;
    const float* c = w.c ? w.c + k : nullptr;
    if (job.d_deltas && job.adds_deltas) {
      weigh_segments(job, product, c, (float*)job.d_deltas + at, true);
    } else if (job.d_deltas) {
      weigh_segments(job, product, c, (Delta*)job.d_deltas + at, false);
    }
    for (int64_t g = 0; job.d_c && g < job.num_segments; g++) {
      job.d_c[(v * job.num_segments + g) * w.K + k] += inner_product<Delta>(
          (const Delta*)w.deltas + at, product + g * job.tokens * job.columns, job.columns);
    }
  }
}

static void spread(const SpreadJob& job, int64_t token_begin, int64_t token_end) {
  with_types(job.weights.base_dtype, job.weights.deltas_dtype, [&](const auto* base, const auto* deltas) {
    for (int64_t v = token_begin; v < token_end; v++) spread_token(job, base, deltas, v);
  });
  if (job.past_caches) end_streams();
}
