// A chunk's products where rows share their weightings with few others: one with each stream of weights, by torch's
// GEMM.
#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

constexpr float kOne = 1.0f;

class StreamProducts : public Products {
 public:
  explicit StreamProducts(const LogprobCall& call)
      : job_(call.job), M_(call.kept.size()), x_(call.rows_of_hidden(staged_)) {}

  void run(const Weights& weights, const Process& process, float* gradient, const ChunkGradients& gradients) override {
    if (weights.base) gemm(chunk(job_.logits), stream(weights, -1), x_.transposed(), false);
    for (int64_t k = 0; k < job_.K; k++) gemm(copy(k), stream(weights, k), x_.transposed(), false);
    process.places(0, job_.places / kLanes);
    process.sums();
    for (int64_t k = weights.base ? -1 : 0; k < job_.K; k++) {
      if (!gradient && !(k < 0 ? gradients.base : gradients.deltas)) continue;
      if (k >= 0) weigh(k);
      const Matrix dy = k < 0 ? chunk(job_.logits) : copy(k);
      if (gradient) gemm({gradient, M_, job_.D, job_.D, 1}, dy.transposed(), stream(weights, k), true);
      if (k < 0 ? gradients.base : gradients.deltas) add_weights(weights, k, dy, gradients);
    }
  }

 private:
  // The head's output, or what else lies like it, as [tokens, M].
  Matrix chunk(float* values) const { return {values, job_.tokens, M_, job_.panel, 1}; }
  Matrix copy(int64_t k) const { return chunk(job_.copies + k * job_.size()); }

  void weigh(int64_t k) const {
    const LogprobKernels& kernels = logprob_kernels_in_use();
    parallel(job_.places / kLanes, kLanes * job_.tokens,
             [&](int64_t begin, int64_t end) { kernels.weigh(job_, k, copy(k).data, begin, end); });
  }

  Matrix panel() {
    if (!panel_.get()) panel_ = Scratch(job_.capacity * job_.D);
    return {panel_.get(), job_.tokens, job_.D, job_.D, 1};
  }

  // The chunk of one stream of weights, the base for k = -1: where it lies, or converted.
  Matrix stream(const Weights& w, int64_t k) {
    if (k < 0 && w.base_dtype == Dtype::f32) {
      return read_only(static_cast<const float*>(w.base), w.N, w.D, w.D, 1);
    }
    if (k >= 0 && w.deltas_dtype == Dtype::f32) {
      return read_only(static_cast<const float*>(w.deltas) + k * w.D, w.N, w.D, w.K * w.D, 1);
    }
    const int32_t copy = static_cast<int32_t>(k);
    const Mix one{k < 0, k < 0 ? 0 : 1, &copy, &kOne};
    const Matrix out = panel();
    parallel(w.N, 2 * w.D, [&](int64_t begin, int64_t end) {
      kernels_in_use().mix(w, one, begin, end, 0, w.D, out.data + begin * w.D, w.D);
    });
    return out;
  }

  // The gradient of one stream: a product with dy or, for a copy, with c_k dy.
  void add_weights(const Weights& w, int64_t k, const Matrix& dy, const ChunkGradients& gradients) {
    const Dtype dtype = k < 0 ? w.base_dtype : gradients.adds_deltas ? Dtype::f32 : w.deltas_dtype;
    const int64_t row = (k < 0 ? 1 : w.K) * w.D, at = k < 0 ? 0 : k * w.D;
    void* out = k < 0 ? gradients.base : gradients.deltas;
    if (dtype == Dtype::f32) {
      gemm({static_cast<float*>(out) + at, w.N, w.D, row, 1}, dy, x_, k >= 0 && gradients.adds_deltas);
      return;
    }
    const Matrix product = panel();
    gemm(product, dy, x_, false);
    parallel(w.N, w.D, [&](int64_t begin, int64_t end) {
      GradTile tile{product.data + begin * w.D, w.D, end - begin, w.D, 1, &kOne, out, dtype, begin * row + at, row};
      kernels_in_use().grad(tile);
    });
  }

  const LogitsJob& job_;
  const int64_t M_;
  Scratch staged_, panel_;
  const Matrix x_;
};

}  // namespace

std::unique_ptr<Products> stream_products(const LogprobCall& call) { return std::make_unique<StreamProducts>(call); }

}  // namespace clp::logprob
