// A chunk's products where many rows share a weighting: each segment's mix lies in a panel that stays in the caches
// while torch's GEMM multiplies by it, for the logits and again for the gradient of hidden.
#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

constexpr float kOne = 1.0f;

class PanelProducts : public Products {
 public:
  explicit PanelProducts(const LogprobCall& call)
      : call_(call),
        job_(call.job),
        segments_(call.kept.plan.segments),
        x_(call.rows_of_hidden(staged_)),
        panel_floats_(job_.capacity * job_.D),
        panel_(panel_floats_) {}

  void run(const Weights& weights, const Process& process, float* gradient, const ChunkGradients& gradients) override {
    for (size_t g = 0; g < segments_.size(); g++) {
      const Segment& segment = segments_[g];
      const int64_t first = call_.places[segment.begin], rows = segment.end - segment.begin;
      const Matrix mix = mixed(weights, call_.mixes.of_segment(static_cast<int64_t>(g))), logits = logits_of(segment);
      gemm(logits, mix, x_.row_range(segment.begin, segment.end).transposed(), false);
      process.places(first / kLanes, ceil_div(first + rows, kLanes));
      if (!gradient) continue;
      const Matrix out{gradient + segment.begin * job_.D, rows, job_.D, job_.D, 1};
      gemm(out, logits.transposed(), mix, true);
    }
    process.sums();
    if (gradients.is_none()) return;
    const int64_t columns = range_columns(gradients);
    for (int64_t d0 = 0; d0 < job_.D; d0 += columns) {
      add_range(weights, gradients, d0, std::min(job_.D, d0 + columns));
    }
  }

 private:
  bool is_one() const { return segments_.size() == 1; }

  // The head's output of a segment's rows, as [tokens, rows].
  Matrix logits_of(const Segment& segment) const {
    return {job_.logits + call_.places[segment.begin], job_.tokens, segment.end - segment.begin, job_.panel, 1};
  }

  Matrix mixed(const Weights& w, const Mix& mix) const {
    const Matrix out{panel_.get(), w.N, w.D, w.D, 1};
    parallel(w.N, w.D * (mix.count + 1), [&](int64_t begin, int64_t end) {
      kernels_in_use().mix(w, mix, begin, end, 0, w.D, out.data + begin * w.D, w.D);
    });
    return out;
  }

  // A token's rows of a gradient from sums, or of sums themselves.
  struct Rows {
    void* out;
    Dtype dtype;
    int64_t token, copy, first;  // from a token, and from a copy, to the next; elements before the first
    bool add, past_caches;

    void put(int64_t v, const float* g, int64_t columns, int64_t K, const float* c) const {
      if (!out) return;
      kernels_in_use().grad({g, columns, 1, columns, K, c, out, dtype, v * token + first, 0, copy, add, past_caches});
    }
  };

  // Outputs whose sums over several segments wait beside a segment's product.
  int64_t num_sums(const ChunkGradients& gradients) const {
    return is_one() ? 0 : (gradients.deltas ? job_.K : 0) + (gradients.base ? 1 : 0);
  }

  int64_t range_columns(const ChunkGradients& gradients) {
    const int64_t parts = 1 + num_sums(gradients), columns = std::max(job_.D / parts / kLanes * kLanes, kLanes);
    const int64_t range = std::min(is_one() ? job_.D : columns, job_.D), floats = job_.capacity * range * parts;
    if (floats > panel_floats_) panel_ = Scratch(panel_floats_ = floats);
    return range;
  }

  // Inputs [d0, d1) of the weights' gradients: G_s = dy_s^T x_s of each segment to its copies.
  void add_range(const Weights& w, const ChunkGradients& gradients, int64_t d0, int64_t d1) {
    const int64_t K = job_.K, D = job_.D, columns = d1 - d0, parts = num_sums(gradients);
    const Matrix product{panel_.get(), job_.tokens, columns, columns, 1};
    float* sums = panel_.get() + job_.tokens * columns;
    const bool adds = gradients.adds_deltas;
    const Rows deltas{gradients.deltas, adds ? Dtype::f32 : w.deltas_dtype, K * D, D, d0, adds,
                      gradients.past_caches && !adds};
    const Rows base{gradients.base, w.base_dtype, D, 0, d0, false, gradients.past_caches};
    for (size_t g = 0; g < segments_.size(); g++) {
      const Segment& segment = segments_[g];
      const float* c = call_.args.c + segment.weighting * K;
      gemm(product, logits_of(segment), x_.row_range(segment.begin, segment.end).column_range(d0, d1), false);
      const Rows deltas_sums{gradients.deltas ? sums : nullptr, Dtype::f32, parts * columns, columns, 0, g > 0, false};
      const Rows base_sums{gradients.base ? sums : nullptr, Dtype::f32, parts * columns, 0, (parts - 1) * columns,
                           g > 0, false};
      std::vector<double> dots(gradients.d_c ? job_.tokens * K : 0);
      parallel(job_.tokens, columns * (1 + K), [&](int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; v++) {
          const float* of_token = product.data + v * columns;
          (is_one() ? deltas : deltas_sums).put(v, of_token, columns, K, c);
          (is_one() ? base : base_sums).put(v, of_token, columns, 1, &kOne);
          if (gradients.d_c) add_dots(w, v, of_token, d0, columns, &dots[v * K]);
        }
        if (is_one() && gradients.past_caches) kernels_in_use().end_streams();
      });
      for (size_t i = 0; i < dots.size(); i++) gradients.d_c[segment.weighting * K + i % K] += dots[i];
    }
    if (parts == 0) return;
    parallel(job_.tokens, columns * parts, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; v++) {
        const float* of_token = sums + v * parts * columns;
        for (int64_t k = 0; gradients.deltas && k < K; k++) {
          Rows copy = deltas;
          copy.first += k * D;
          copy.put(v, of_token + k * columns, columns, 1, &kOne);
        }
        base.put(v, of_token + (parts - 1) * columns, columns, 1, &kOne);
      }
      if (gradients.past_caches) kernels_in_use().end_streams();
    });
  }

  void add_dots(const Weights& w, int64_t v, const float* product, int64_t d0, int64_t columns, double* dots) const {
    GradTile tile{product, columns, 1, columns, job_.K};
    tile.deltas = w.deltas;
    tile.deltas_dtype = w.deltas_dtype;
    tile.first_delta = v * job_.K * job_.D + d0;
    tile.delta_copy = job_.D;
    tile.dots = dots;
    kernels_in_use().grad(tile);
  }

  const LogprobCall& call_;
  const LogitsJob& job_;
  const std::vector<Segment>& segments_;
  Scratch staged_;
  const Matrix x_;
  int64_t panel_floats_;
  Scratch panel_;            // a segment's mix; then its products, and sums of them
};

}  // namespace

std::unique_ptr<Products> panel_products(const LogprobCall& call) { return std::make_unique<PanelProducts>(call); }

}  // namespace clp::logprob
