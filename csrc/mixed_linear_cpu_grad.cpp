// Gradients of mixed_linear's deltas and coefficients on the CPU.
//
// Long segments: one product G_s = dy_s^T x_s for each tile of the weight and each segment, then d_delta[:, k] +=
// c[s, k] G_s and d_c[s, k] += <delta[:, k], G_s> while the tile is in a cache: the multiply-adds of one weight
// gradient, whatever K. By torch; bfloat16 rows on a processor that multiplies tiles, by
// mixed_linear_cpu_tile_gradient.cpp. Shorter ones, and batch_invariant: in own blocks,
// mixed_linear_cpu_fused_gradient.cpp.
// Short segments: d_delta[:, k] = (c_k dy)^T x of all rows, d_c from the streams' products.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu_pages.h"
#include "mixed_linear_cpu_ops.h"
#include "mixed_linear_cpu_tile_gradient.h"

namespace clp {

namespace {

// Rows of one staged product, and a tile's inputs and outputs: tile, sums and widened rows make up at most 3.5 MiB.
constexpr int64_t kStagedRows = 256;
constexpr int64_t kInputs = 512, kOutputs = 512, kSumFloats = 5 << 17;
// Rows of a tile whose part of d_c is summed by itself: the order of that sum does not depend on the threads.
constexpr int64_t kPartRows = 16;

// By torch's product or tiles of bfloat16.
class WeightGradient {
 public:
  explicit WeightGradient(const DeltasGradient& job)
      : args_(job.args),
        plan_(job.plan),
        w_(job.args.weights),
        dy_(job.dy),
        x_(job.x),
        out_(job.floats),
        add_(job.add),
        rounded_(job.rounded),
        by_copy_(job.by_copy),
        dy_in_place_(dy_.is_float() && plan_.order.empty() && !by_copy_),
        x_in_place_(x_.is_float() && plan_.order.empty()),
        in_blocks_(!dy_in_place_ || !x_in_place_),
        sums_segments_(rounded_ && !by_copy_ && plan_.segments.size() > 1),
        past_caches_(plan_.segments.size() == 1 && !add_ && job.bytes() >= kPastCaches),
        outputs_(outputs_of_tile()),
        tiles_(tiles_for(job), plan_, dy_, x_, w_, outputs_),
        inputs_(tiles_ ? TileMultiplier::kInputs : kInputs),
        tile_(outputs_ * inputs_),
        sums_(sums_segments_ ? outputs_ * inputs_ * w_.K : 0),
        staged_dy_(dy_in_place_ || tiles_ ? 0 : kStagedRows * outputs_),
        staged_x_(x_in_place_ || tiles_ ? 0 : kStagedRows * kInputs) {}

  // The kernels that multiply tiles, where the rows are theirs; else null.
  static const TileProductKernels* tiles_for(const DeltasGradient& job) {
    const bool is_bfloat16 = job.dy.dtype == Dtype::bf16 && job.x.dtype == Dtype::bf16;
    return is_bfloat16 && !job.by_copy ? tile_products_in_use() : nullptr;
  }

  // d_c [S, K] is added to, or null.
  void run(double* d_c) {
    for (n0_ = 0; n0_ < w_.N; n0_ += outputs_) {
      n1_ = std::min(w_.N, n0_ + outputs_);
      if (tiles_) tiles_.start_outputs(n0_, n1_);
      for (d0_ = 0; d0_ < w_.D; d0_ += inputs_) {
        d1_ = std::min(w_.D, d0_ + inputs_);
        by_copy_ ? copies() : segments(d_c);
      }
    }
  }

 private:
  int64_t width() const { return d1_ - d0_; }
  int64_t step() const { return tiles_ ? inputs_ : width(); }

  // Whole tiles, where bfloat16 ones are multiplied.
  int64_t outputs_of_tile() const {
    if (!sums_segments_) return kOutputs;
    return std::clamp<int64_t>(kSumFloats / (kInputs * (w_.K + 1)) / 32 * 32, 32, kOutputs);
  }

  void segments(double* d_c) {
    for (size_t g = 0; g < plan_.segments.size(); g++) {
      const Segment& segment = plan_.segments[g];
      if (tiles_) {
        tiles_.run(g, d0_, d1_, tile_.get(), step());
      } else {
        product(segment.begin, segment.end, -1, false, tile_.get(), step());
      }
      spread(segment, g == 0, d_c ? d_c + segment.weighting * w_.K : nullptr);
    }
    if (!sums_segments_) return;
    for (int64_t k = 0; k < w_.K; k++) round(sums_.get() + k * width(), w_.K * width(), k);
  }

  void copies() {
    for (int64_t k = 0; k < w_.K; k++) {
      if (out_) {
        product(0, args_.M, k, add_, out_ + (n0_ * w_.K + k) * w_.D + d0_, w_.K * w_.D);
      } else {
        product(0, args_.M, k, false, tile_.get(), width());
        round(tile_.get(), width(), k);
      }
    }
  }

  // out [n1 - n0, d1 - d0] = or += dy^T x over places [begin, end), dy times the coefficient of `copy` or, for -1, 1.
  void product(int64_t begin, int64_t end, int64_t copy, bool add, float* out, int64_t step) {
    const int64_t rows = in_blocks_ ? kStagedRows : end - begin;
    for (int64_t m0 = begin; m0 < end; m0 += rows, add = true) {
      const int64_t m1 = std::min(end, m0 + rows);
      const Matrix dy = dy_in_place_
                            ? read_only(dy_.floats() + m0 * w_.N + n0_, m1 - m0, n1_ - n0_, w_.N, 1)
                            : staged(dy_, m0, m1, w_.N, n0_, n1_, copy, staged_dy_.get());
      const Matrix x = x_in_place_ ? read_only(x_.floats() + m0 * w_.D + d0_, m1 - m0, width(), w_.D, 1)
                                   : staged(x_, m0, m1, w_.D, d0_, d1_, -1, staged_x_.get());
      gemm({out, n1_ - n0_, width(), step, 1}, dy.transposed(), x, add);
    }
  }

  Matrix staged(const Array& values, int64_t m0, int64_t m1, int64_t size, int64_t begin, int64_t end, int64_t copy,
                float* out) {
    const Kernels& kernels = kernels_in_use();
    parallel(m1 - m0, end - begin, [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; m++) {
        const int64_t row = plan_.row(m0 + m);
        const float scale = copy < 0 ? 1.0f : args_.coefficients(row)[copy];
        kernels.widen(values.data, values.dtype, row * size + begin, end - begin, scale, out + m * (end - begin));
      }
    });
    return {out, m1 - m0, end - begin, end - begin, 1};
  }

  // The segment's tile to all copies, each gradient read or written once, and each delta read once.
  void spread(const Segment& segment, bool is_first, double* d_c) {
    const int64_t K = w_.K, parts = ceil_div(n1_ - n0_, kPartRows);
    std::vector<double> dots(d_c ? parts * K : 0, 0.0);
    parallel(parts, kPartRows * width() * K, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        spread_part(segment, part * kPartRows, is_first, d_c ? dots.data() + part * K : nullptr);
      }
      if (past_caches_) kernels_in_use().end_streams();
    });
    for (size_t i = 0; i < dots.size(); i++) d_c[i % K] += dots[i];
  }

  // Rows from `row` on of the tile.
  void spread_part(const Segment& segment, int64_t row, bool is_first, double* dots) {
    const int64_t K = w_.K, rows = std::min(kPartRows, n1_ - n0_ - row);
    const Kernels& kernels = kernels_in_use();
    GradTile tile{tile_.get() + row * step(), step(), rows, width(), K, args_.c + segment.weighting * K};
    if (sums_segments_) {
      tile.out = sums_.get();
      tile.first_out = row * K * width();
      tile.out_row = K * width();
      tile.out_copy = width();
    } else {
      tile.out = out_ ? out_ : rounded_;
      tile.out_dtype = out_ ? Dtype::f32 : w_.deltas_dtype;
      tile.first_out = (n0_ + row) * K * w_.D + d0_;
      tile.out_row = K * w_.D;
      tile.out_copy = w_.D;
      tile.past_caches = past_caches_;
    }
    tile.add = (out_ && add_) || !is_first;
    tile.deltas = w_.deltas;
    tile.deltas_dtype = w_.deltas_dtype;
    tile.first_delta = (n0_ + row) * K * w_.D + d0_;
    tile.delta_row = K * w_.D;
    tile.delta_copy = w_.D;
    tile.dots = dots;
    kernels.grad(tile);
  }

  void round(const float* sums, int64_t step, int64_t k) {
    const Kernels& kernels = kernels_in_use();
    parallel(n1_ - n0_, width(), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t at = ((n0_ + n) * w_.K + k) * w_.D + d0_;
        kernels.narrow(sums + n * step, width(), rounded_, w_.deltas_dtype, at);
      }
    });
  }

  const MixedLinearArgs& args_;
  const Plan& plan_;
  const Weights& w_;
  const Array dy_, x_;
  float* const out_;
  const bool add_;
  void* const rounded_;
  const bool by_copy_, dy_in_place_, x_in_place_, in_blocks_;
  const bool sums_segments_; // in float32, before they are rounded
  const bool past_caches_;
  const int64_t outputs_;
  TileMultiplier tiles_;
  const int64_t inputs_;
  const Scratch tile_, sums_;
  const Scratch staged_dy_, staged_x_;
  int64_t n0_ = 0, n1_ = 0, d0_ = 0, d1_ = 0;
};

// d_c[s, k] += <dy_m, x_m delta_k^T> over the rows of weighting s: the streams' products again. Tiles come from any
// thread: each leaves its rows' sums in places of its own, which are added in order.
void add_dots_of_streams(const MixedLinearArgs& args, const Array& dy, const Array& x, bool batch_invariant,
                         double* d_c) {
  constexpr int64_t kMostRows = 256, kSums = 1 << 18;  // at most 2 MiB
  const Plan as_they_are;
  const float one = 1.0f;
  const Way way = batch_invariant ? Way::fused : Way::torch;
  // Tiles begin at a multiple of this many outputs, and each so many are summed by themselves.
  const int64_t step = way == Way::fused ? kernels_in_use().group : 32;
  const int64_t K = args.weights.K, N = args.weights.N, tiles = ceil_div(N, step);
  const int64_t rows = std::clamp<int64_t>(kSums / std::max<int64_t>(tiles, 1), 1, std::min(kMostRows, args.M));
  std::vector<double> sums(rows * tiles);
  for (int32_t k = 0; k < K; k++) {
    Product product{args, as_they_are, x, false, way, {{}}, {{{false, 1, &k, &one}, -1}}, 1, nullptr, {}};
    for (int64_t m0 = 0; m0 < args.M; m0 += rows) {
      product.segments[0] = {m0, std::min(args.M, m0 + rows), 0};
      std::fill(sums.begin(), sums.end(), 0.0);
      product.finish = [&](const Tile& tile) {
        std::vector<float> dy_row(tile.j1 - tile.j0);
        for (int64_t m = tile.m0; m < tile.m1; m++) {
          kernels_in_use().widen(dy.data, dy.dtype, m * N + tile.j0, tile.j1 - tile.j0, 1.0f, dy_row.data());
          const float* z = tile.data + (m - tile.m0) * tile.step;
          for (int64_t first = 0; first < tile.j1 - tile.j0; first += step) {
            double sum = 0.0;
            for (int64_t j = first; j < std::min(first + step, tile.j1 - tile.j0); j++) {
              sum += static_cast<double>(dy_row[j]) * z[j];
            }
            sums[(m - m0) * tiles + (tile.j0 + first) / step] = sum;
          }
        }
      };
      run_product(product);
      for (int64_t m = m0; m < product.segments[0].end; m++) {
        for (int64_t t = 0; t < tiles; t++) d_c[args.row_map[m] * K + k] += sums[(m - m0) * tiles + t];
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> mixed_linear_cpu_backward_deltas(const Tensor& dy, const Tensor& x, const Tensor& deltas,
                                                            const Tensor& c, const Tensor& row_map, bool needs_deltas,
                                                            bool needs_coefficients,
                                                            const std::optional<Tensor>& main_grad,
                                                            bool batch_invariant) {
  const MixedLinearArgs args(std::nullopt, deltas, c, row_map);
  const Weights& w = args.weights;
  const int64_t M = args.M, S = args.S;
  const Tensor dy_rows = contiguous_rows(dy, "dy", M, w.N), x_rows = contiguous_rows(x, "x", M, w.D);
  float* const added_to = main_grad ? main_grad_floats(*main_grad, w.N, w.K, w.D) : nullptr;
  const bool returns_deltas = needs_deltas && !main_grad;
  Tensor d_deltas = returns_deltas ? torch::stable::new_empty(deltas, {w.N, w.K, w.D})
                                   : torch::stable::new_empty(deltas, {0});
  Tensor d_c = needs_coefficients ? torch::stable::new_zeros(c, {S, w.K}) : torch::stable::new_empty(c, {0});
  if (M == 0) {
    if (returns_deltas) torch::stable::zero_(d_deltas);
    return {d_deltas, d_c};
  }
  if (returns_deltas) make_pages(d_deltas);
  Plan plan = plan_rows(args.row_map, M, S);
  const bool by_copy = copies_are_cheaper(M, static_cast<int64_t>(plan.segments.size()), w.K);
  if (by_copy) plan.order.clear();
  std::vector<double> sums(needs_coefficients ? S * w.K : 0, 0.0);
  DeltasGradient job{args, plan, array_of(dy_rows, "dy"), array_of(x_rows, "x")};
  job.by_copy = by_copy;
  job.add = added_to && needs_deltas;
  if (job.add) job.floats = added_to;
  if (returns_deltas && w.deltas_dtype == Dtype::f32) job.floats = static_cast<float*>(d_deltas.mutable_data_ptr());
  if (returns_deltas && w.deltas_dtype != Dtype::f32) job.rounded = d_deltas.mutable_data_ptr();
  if (needs_coefficients && !by_copy) job.d_c = sums.data();
  if (needs_deltas || !by_copy) {
    const bool is_short = !by_copy && gradient_is_fused(M, static_cast<int64_t>(plan.segments.size()));
    const bool is_fused = batch_invariant || (is_short && !WeightGradient::tiles_for(job));
    is_fused ? run_fused_gradient(job) : WeightGradient(job).run(job.d_c);
  }
  if (needs_coefficients && by_copy) add_dots_of_streams(args, job.dy, job.x, batch_invariant, sums.data());
  float* results = needs_coefficients ? static_cast<float*>(d_c.mutable_data_ptr()) : nullptr;
  for (size_t i = 0; i < sums.size(); i++) results[i] = static_cast<float>(sums[i]);
  return {d_deltas, d_c};
}

}  // namespace clp
