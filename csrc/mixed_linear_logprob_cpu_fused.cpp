// A chunk's products with each segment's mix, made as they go: the logits lie in panels of places, as packed rows give
// them, and every product takes them or their gradients from there.
#include <algorithm>
#include <utility>

#include "mixed_linear_cpu_blocks.h"
#include "mixed_linear_logprob_cpu_call.h"

namespace clp::logprob {

namespace {

// Rows whose inputs a thread takes together for the weights' gradients, floats of them, and of its sums, at most.
constexpr int64_t kRangeRows = 1024, kRangeFloats = 1 << 18, kSums = 1 << 18;

constexpr float kOne = 1.0f;

class FusedProducts : public Products {
 public:
  explicit FusedProducts(const LogprobCall& call)
      : call_(call),
        job_(call.job),
        kernels_(kernels_in_use()),
        width_(kernels_.panel_rows),
        group_(kernels_.group),
        tile_(group_ * width_),
        inputs_at_once_(even_blocks(job_.D, kFusedTerms, width_ / 2)),
        tokens_at_once_(even_blocks(job_.capacity, kFusedTerms, width_ / 2)),
        turned_rows_(ceil_div(width_, ceil_div(width_, group_))),
        rows_(call.kept.plan.segments, width_),
        mixed_(std::max(BlockMixes::outputs_scratch(inputs_at_once_, rows_.pieces.size()), group_ * width_)),
        packed_(rows_.places * job_.D) {
    pack();
  }

  void run(const Weights& weights, const Process& process, float* gradient, const ChunkGradients& gradients) override {
    make_logits(weights);
    process.places(0, job_.places / kLanes);
    process.sums();
    if (gradient) add_hidden(weights, gradient);
    if (!gradients.is_none()) add_weights(weights, gradients);
  }

 private:
  // Rows of hidden, turned: [blocks of inputs, panels, inputs, width].
  void pack() {
    const int32_t* order = call_.kept.order.empty() ? nullptr : call_.kept.order.data();
    const int64_t D = job_.D, pieces = static_cast<int64_t>(rows_.pieces.size());
    const ThreadScratch rows(width_ * inputs_at_once_);
    parallel(ceil_div(D, inputs_at_once_) * pieces, width_ * inputs_at_once_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const Piece& piece = rows_.pieces[i % pieces];
        const int64_t d0 = i / pieces * inputs_at_once_, d1 = std::min(D, d0 + inputs_at_once_), size = d1 - d0;
        float* out = packed_.get() + rows_.places * d0 + piece.place * size;
        for (int64_t m = piece.begin; m < piece.end; m += width_, out += width_ * size) {
          const int64_t count = std::min(width_, piece.end - m);
          kernels_.stage({call_.hidden.data, call_.hidden.dtype, order, m, count, D, d0, d1, size, nullptr,
                          rows.get()});
          kernels_.pack(rows.get(), count, size, size, out);
        }
      }
    });
  }

  BlockMixes mixes_of(const Block& block, const Weights& weights, int64_t terms) const {
    std::vector<const Mix*> mixes;
    for (size_t s = 0; s < block.count; s++) {
      mixes.push_back(&call_.mixes.of_segment(static_cast<int64_t>(rows_.pieces[block.first + s].segment)));
    }
    return {weights, rows_, block, std::move(mixes), terms};
  }

  // A token's logit at a place; the next token's is `width_` further on.
  float* logits(int64_t place, int64_t token) const {
    return job_.logits + (place / width_ * job_.capacity + token) * width_ + place % width_;
  }

  void make_logits(const Weights& weights) {
    const int64_t tokens = weights.N;
    parallel(ceil_div(tokens, group_), group_ * job_.D * call_.kept.size(), [&](int64_t begin, int64_t end) {
      for (const Block& block : rows_.blocks) {
        mixes_of(block, weights, inputs_at_once_)
            .by_outputs(begin * group_, std::min(tokens, end * group_), mixed_.get(), [](const Slice&) {},
                        [&](const Piece& piece, const Slice& slice, const float* mix, Fetch& fetch) {
                          const int64_t size = slice.d1 - slice.d0;
                          const float* x = packed_.get() + rows_.places * slice.d0 + piece.place * size;
                          kernels_.block_product({mix, size, width_, false, slice.n1 - slice.n0, x, width_ * size,
                                                  size, piece.rows(), slice.d0 > 0, logits(piece.place, slice.n0),
                                                  width_, job_.capacity * width_},
                                                 fetch);
                        });
      }
    });
  }

  // gradient[m, d] += sum over tokens of dy[m] weights[d]
  void add_hidden(const Weights& weights, float* gradient) {
    const int64_t D = job_.D;
    if (!panels_) {
      panels_ = std::make_unique<ThreadScratch>(BlockMixes::inputs_scratch(tokens_at_once_, rows_.pieces.size(), D));
    }
    parallel(ceil_div(D, width_), width_ * weights.N * call_.kept.size(), [&](int64_t begin, int64_t end) {
      float* tile = mixed_.get();
      for (const Block& block : rows_.blocks) {
        mixes_of(block, weights, tokens_at_once_)
            .by_inputs(begin * width_, std::min(D, end * width_), turned_rows_, width_, panels_->get(),
                       [](const Slice&) {},
                       [&](const Piece& piece, int64_t m, int64_t rows, const Slice& slice, const float* panels,
                           Fetch& fetch) {
                         const int64_t size = slice.n1 - slice.n0;
                         const float* dy = logits(piece.place + m, slice.n0);
                         float* out = gradient + (piece.begin + m) * D;
                         for (int64_t d = slice.d0; d < slice.d1; d += width_, panels += width_ * size) {
                           const bool is_whole = d + width_ <= D;
                           kernels_.block_product({dy, width_, 0, true, rows, panels, 0, size, width_, is_whole,
                                                   is_whole ? out + d : tile, is_whole ? D : width_, 0, 0, &kOne, 1},
                                                  fetch);
                           for (int64_t i = 0; !is_whole && i < rows; i++) {
                             for (int64_t j = d; j < D; j++) out[i * D + j] += tile[i * width_ + j - d];
                           }
                         }
                       });
      }
    });
  }

  // Sums of a tile of the weights' gradients: each copy's, and the base's, for which all segments count as they are.
  struct Sums {
    Sums(const FusedProducts& of, const ChunkGradients& gradients)
        : copies(gradients.deltas ? of.job_.K : 0), each(copies + (gradients.base ? 1 : 0)) {
      for (const Segment& segment : of.call_.kept.plan.segments) {
        const float* c = of.call_.args.c + segment.weighting * of.job_.K;
        scales.insert(scales.end(), c, c + copies);
        if (gradients.base) scales.push_back(1.0f);
      }
    }

    const int64_t copies, each;
    std::vector<float> scales;   // [segments, each]
  };

  // Pieces whose rows are taken together.
  struct Range {
    size_t first, last;
  };

  void prepare_weights(const ChunkGradients& gradients) {
    if (sums_) return;
    sums_ = std::make_unique<Sums>(*this, gradients);
    inputs_ = Scratch(ceil_div(job_.D, width_) * width_ * call_.kept.size());
    call_.stage_hidden(width_, inputs_.get());
    int64_t rows = kRangeRows, most = 0;
    for (size_t i = 0; i < rows_.pieces.size(); i++) {
      if (rows + rows_.pieces[i].rows() > kRangeRows) ranges_.push_back({i, i}), rows = 0;
      ranges_.back().last = i + 1;
      rows += rows_.pieces[i].rows();
      most = std::max(most, rows);
    }
    const int64_t kept_groups = ranges_.size() == 1 ? 1 : ceil_div(job_.capacity, group_);
    const int64_t panel_sums = kept_groups * tile_ * std::max<int64_t>(sums_->each, 1);
    range_panels_ = std::max<int64_t>(std::min(kRangeFloats / (most * width_), kSums / panel_sums), 1);
    range_panels_ = std::min(range_panels_, ceil_div(job_.D, width_));
    tiles_ = std::make_unique<ThreadScratch>(range_panels_ * panel_sums);
  }

  void add_weights(const Weights& weights, const ChunkGradients& gradients) {
    prepare_weights(gradients);
    const int64_t dots_each = static_cast<int64_t>(call_.kept.plan.segments.size()) * job_.K;
    const int64_t groups = ceil_div(weights.N, group_);
    std::vector<double> dots(gradients.d_c ? groups * dots_each : 0);
    parallel(groups, group_ * job_.D * call_.kept.size(), [&](int64_t begin, int64_t end) {
      const int64_t step = range_panels_ * width_;
      for (int64_t d0 = 0; d0 < job_.D; d0 += step) {
        for (const Range& range : ranges_) {
          for (int64_t group = begin; group < end; group++) {
            const int64_t at = ranges_.size() == 1 ? 0 : group - begin;
            float* sums = tiles_->get() + at * range_panels_ * sums_->each * tile_;
            const int64_t d1 = std::min(job_.D, d0 + step);
            add_products(weights, range, group, d0, d1, sums, gradients.d_c ? &dots[group * dots_each] : nullptr);
            if (&range == &ranges_.back()) write(weights, group, d0, d1, sums, gradients);
          }
        }
      }
      if (gradients.past_caches) kernels_.end_streams();
    });
    for (size_t i = 0; i < dots.size(); i++) {
      const int64_t at = static_cast<int64_t>(i) % dots_each;
      gradients.d_c[call_.kept.plan.segments[at / job_.K].weighting * job_.K + at % job_.K] += dots[i];
    }
  }

  // sums [panels, each, group, width]: the products dy^T x of a group of tokens with each piece of the range
  void add_products(const Weights& weights, const Range& range, int64_t group, int64_t d0, int64_t d1, float* sums,
                    double* dots) {
    const int64_t tokens = std::min(group_, weights.N - group * group_), M = call_.kept.size();
    for (int64_t d = d0; d < d1; d += width_, sums += sums_->each * tile_) {
      for (size_t i = range.first; i < range.last; i++) {
        const Piece& piece = rows_.pieces[i];
        const float *dy = logits(piece.place, group * group_), *x = inputs_.get() + d * M + piece.begin * width_;
        const float* scales = sums_->scales.data() + piece.segment * sums_->each;
        const bool adds = i > 0;
        if (!dots) {
          multiply(dy, x, tokens, piece.rows(), {sums, scales, sums_->each, adds});
          continue;
        }
        float* product = mixed_.get();
        multiply(dy, x, tokens, piece.rows(), {product, &kOne, 1, false});
        GradTile tile{product, width_, tokens, std::min(width_, d1 - d), job_.K};
        tile.deltas = weights.deltas;
        tile.deltas_dtype = weights.deltas_dtype;
        tile.first_delta = group * group_ * job_.K * job_.D + d;
        tile.delta_row = job_.K * job_.D;
        tile.delta_copy = job_.D;
        tile.dots = dots + piece.segment * job_.K;
        kernels_.grad(tile);
        if (sums_->each == 0) continue;
        GradTile share{product, width_, tokens, width_, sums_->each, scales, sums, Dtype::f32, 0, width_, tile_, adds};
        kernels_.grad(share);
      }
    }
  }

  struct Target {
    float* out;
    const float* scales;
    int64_t copies;
    bool add;
  };

  // target = or += scales dy^T x over rows
  void multiply(const float* dy, const float* x, int64_t tokens, int64_t rows, Target target) const {
    Fetch nothing{nullptr, 0, 0, 1, 0};
    for (int64_t m = 0; m < rows; m += kFusedTerms, target.add = true) {
      kernels_.block_product({dy + m * job_.capacity, width_, job_.capacity * width_, false, tokens, x + m * width_, 0,
                              std::min(kFusedTerms, rows - m), width_, target.add, target.out, width_, 0, tile_,
                              target.scales, target.copies},
                             nothing);
    }
  }

  // The finished sums of a group of tokens.
  void write(const Weights& weights, int64_t group, int64_t d0, int64_t d1, const float* sums,
             const ChunkGradients& gradients) const {
    const int64_t tokens = std::min(group_, weights.N - group * group_), D = job_.D, K = job_.K;
    GradTile copies{};
    copies.g_step = sums_->each * tile_;
    copies.K = 1;
    copies.c = &kOne;
    copies.out = gradients.deltas;
    copies.out_dtype = gradients.adds_deltas ? Dtype::f32 : weights.deltas_dtype;
    copies.add = gradients.adds_deltas;
    copies.past_caches = gradients.past_caches && !copies.add;
    GradTile base = copies;
    base.out = gradients.base;
    base.out_dtype = weights.base_dtype;
    base.add = false;
    base.past_caches = gradients.past_caches;
    for (int64_t i = 0; i < tokens; i++) {
      const int64_t token = group * group_ + i;
      const float* g = sums + i * width_;
      for (int64_t k = 0; k < sums_->copies; k++) {
        copies.g = g + k * tile_;
        copies.first_out = (token * K + k) * D + d0;
        write_row(kernels_, copies, d1 - d0);
      }
      base.g = g + sums_->copies * tile_;
      base.first_out = token * D + d0;
      if (gradients.base) write_row(kernels_, base, d1 - d0);
    }
  }

  const LogprobCall& call_;
  const LogitsJob& job_;
  const Kernels& kernels_;
  const int64_t width_, group_, tile_;
  const int64_t inputs_at_once_, tokens_at_once_;  // terms of a sum
  const int64_t turned_rows_;                      // of a panel of places, in equal parts
  const RowBlocks rows_;
  const ThreadScratch mixed_;                      // or one tile
  const Scratch packed_;
  std::unique_ptr<ThreadScratch> panels_, tiles_;
  std::unique_ptr<Sums> sums_;
  Scratch inputs_;                                 // rows of hidden: [panels, M, width]
  std::vector<Range> ranges_;
  int64_t range_panels_ = 0;
};

}  // namespace

std::unique_ptr<Products> fused_products(const LogprobCall& call) { return std::make_unique<FusedProducts>(call); }

}  // namespace clp::logprob
