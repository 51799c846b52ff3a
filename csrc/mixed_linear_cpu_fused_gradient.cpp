// The deltas' gradient in own blocks: a tile of G_s = dy_s^T x_s goes from its registers to each copy's sums. Each
// thread has outputs of its own, and packs the rows for itself.
#include <algorithm>

#include "mixed_linear_cpu_blocks.h"

namespace clp {

namespace {

// Rows and floats of a block of x, packed, and its inputs, at most: 1 MiB. Rows of dy that are multiplied by all of its
// inputs in turn: their packed columns stay in the first-level cache.
constexpr int64_t kBlockRows = 1024, kBlockFloats = 1 << 18, kBlockInputs = 1024, kPartRows = 512;
// Floats of a thread's sums over several blocks of rows, for at least one group of outputs.
constexpr int64_t kSums = 3 << 17;
// The sums of d_c by groups of outputs: their order does not depend on the threads.
constexpr int64_t kDotSums = 1 << 18;

constexpr float kOne = 1.0f;

// Rows [begin, end) in the order of work, of one segment.
struct SegmentRows {
  int64_t begin, end, segment;
};

// Rows of the pieces (parts) [first, last).
struct Range {
  int64_t begin, end;
  size_t first, last;
};

class FusedGradient {
 public:
  explicit FusedGradient(const DeltasGradient& job)
      : job_(job),
        kernels_(kernels_in_use()),
        w_(job.args.weights),
        width_(kernels_.panel_rows),
        group_(kernels_.group),
        padded_group_(ceil_div(group_, width_ / 2) * (width_ / 2)),
        tile_(group_ * width_),
        groups_(ceil_div(w_.N, group_)),
        order_(job.plan.order.empty() ? nullptr : job.plan.order.data()),
        past_caches_(!job.add && job.bytes() >= kPastCaches && width_ * (job.floats ? 4 : 2) >= kLine),
        is_one_sum_(!job.by_copy && job.plan.segments.size() == 1),
        sums_each_(is_one_sum_ ? 1 : w_.K),
        copies_(job.by_copy ? w_.K : 1),
        dots_each_(static_cast<int64_t>(job.plan.segments.size()) * w_.K) {
    list_rows();
    block_rows_ = std::min(kBlockRows, job.args.M);
    inputs_ = std::min(std::min(kBlockInputs, kBlockFloats / std::max<int64_t>(block_rows_, 1)) / width_,
                       ceil_div(w_.D, width_)) * width_;
    sums_step_ = inputs_ * group_ * sums_each_;
    sum_groups_ = blocks_.size() == 1 ? groups_ : std::max<int64_t>(kSums / sums_step_, 1);
    unit_ = job.d_c ? ceil_div(groups_ * dots_each_, kDotSums) : 1;
  }

  void run() {
    const int64_t sums_kept = blocks_.size() == 1 ? 1 : std::min(sum_groups_, groups_);
    const int64_t units = ceil_div(groups_, unit_);
    const ThreadScratch dy(2 * block_rows_ * padded_group_), x(block_rows_ * inputs_), product(job_.d_c ? tile_ : 0);
    const ThreadScratch sums(sums_kept * sums_step_);
    dy_ = &dy;
    x_ = &x;
    product_ = &product;
    sums_ = &sums;
    if (job_.d_c) dots_.assign(units * dots_each_, 0.0);
    // Several units at once, or each by itself: no unit is cut but where it always is.
    const int64_t at_once = sum_groups_ >= unit_ ? sum_groups_ / unit_ * unit_ : sum_groups_;
    const int64_t step = std::max(at_once, unit_);
    parallel(units, unit_ * group_ * w_.D * job_.args.M, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(groups_, end * unit_);
      for (int64_t d0 = 0; d0 < w_.D; d0 += inputs_) {
        const int64_t d1 = std::min(w_.D, d0 + inputs_);
        for (int64_t first = begin * unit_; first < last; first += step) {
          const int64_t end_of_step = std::min(last, first + step);
          for (int64_t group = first; group < end_of_step; group += at_once) {
            run_inputs(group, std::min(end_of_step, group + at_once), d0, d1);
          }
        }
      }
      if (past_caches_) kernels_.end_streams();
    });
    for (size_t i = 0; i < dots_.size(); i++) {
      const int64_t at = static_cast<int64_t>(i) % dots_each_;
      job_.d_c[job_.plan.segments[at / w_.K].weighting * w_.K + at % w_.K] += dots_[i];
    }
  }

 private:
  void list_rows() {
    const std::vector<Segment>& segments = job_.plan.segments;
    if (job_.by_copy) list_segment({0, job_.args.M, 0}, 0);
    for (size_t g = 0; !job_.by_copy && g < segments.size(); g++) list_segment(segments[g], static_cast<int64_t>(g));
    const int64_t size = job_.dy.is_float() ? 4 : 2;
    dy_rows_.reserve(job_.args.M);
    for (int64_t m = 0; m < job_.args.M; m++) {
      dy_rows_.push_back(static_cast<const char*>(job_.dy.data) + job_.plan.row(m) * w_.N * size);
    }
  }

  void list_segment(const Segment& segment, int64_t index) {
    for (int64_t m = segment.begin; m < segment.end;) {
      if (m % kPartRows == 0) parts_.push_back({m, m, pieces_.size(), pieces_.size()});
      if (m % kBlockRows == 0) blocks_.push_back({m, m, parts_.size() - 1, parts_.size() - 1});
      const int64_t end = std::min(segment.end, (m / kPartRows + 1) * kPartRows);
      pieces_.push_back({m, end, index});
      parts_.back().end = blocks_.back().end = m = end;
      parts_.back().last = pieces_.size();
      blocks_.back().last = parts_.size();
    }
  }

  // Groups [first, last) of outputs by inputs [d0, d1). Each group (by copy: and each copy) has its turn.
  void run_inputs(int64_t first, int64_t last, int64_t d0, int64_t d1) {
    const int64_t turns = (last - first) * copies_;
    for (size_t b = 0; b < blocks_.size(); b++) {
      const Range& block = blocks_[b];
      kernels_.stage({job_.x.data, job_.x.dtype, order_, block.begin, block.end - block.begin, w_.D, d0, d1, width_,
                      nullptr, x_->get()});
      stage_dy(first, 0, block.begin, block.end, dy(0));
      for (int64_t turn = 0; turn < turns; turn++) {
        const int64_t at = turn / copies_;
        float* sums = sums_->get() + (blocks_.size() == 1 ? 0 : at * sums_step_);
        run_turn(block, first, turn, turn + 1 < turns, d0, d1, b == 0, sums);
        if (b + 1 == blocks_.size() && turn % copies_ == copies_ - 1) write(first + at, d0, d1, sums);
      }
    }
  }

  // The packed columns of dy of this turn, beside those of the next.
  float* dy(int64_t turn) const { return dy_->get() + turn % 2 * block_rows_ * padded_group_; }

  // Adds the block's products to `sums` [panels, sums_each, group, width]. What the next turn takes of dy is packed
  // meanwhile, some rows after each panel, whose products fetch them: all at once they are more than the second-level
  // cache holds of rows a power of two apart.
  void run_turn(const Range& block, int64_t first, int64_t turn, bool has_next, int64_t d0, int64_t d1, bool is_first,
                float* sums) {
    const int64_t panels = ceil_div(d1 - d0, width_), rows = block.end - block.begin;
    const int64_t group = first + turn / copies_, copy = turn % copies_, next = first + (turn + 1) / copies_;
    const int64_t steps = panels * static_cast<int64_t>(block.last - block.first), slice = ceil_div(rows, steps);
    int64_t begin = block.begin;
    for (size_t h = block.first; h < block.last; h++) {
      const Range& part = parts_[h];
      for (int64_t p = 0; p < panels; p++) {
        const int64_t end = has_next ? std::min(block.end, begin + slice) : begin;
        Fetch fetch = lines_of_dy(next, begin, end, (part.end - part.begin) / 16);
        float* to = sums + p * sums_each_ * tile_ + copy * tile_;
        for (size_t i = part.first; i < part.last; i++) {
          const SegmentRows& piece = pieces_[i];
          const float* dy_rows = dy(turn) + (piece.begin - block.begin) * padded_group_;
          const float* x = x_->get() + (p * rows + piece.begin - block.begin) * width_;
          const bool adds = !is_first || h > block.first || i > part.first;
          const float* c = is_one_sum_ || job_.by_copy ? &kOne : coefficients(piece.segment);
          const Sums sums_of_copies{to, c, job_.by_copy ? 1 : sums_each_, adds};
          if (job_.d_c) {
            multiply(piece, group, dy_rows, x, {product_->get(), &kOne, 1, false}, fetch);
            share_product(piece, group, d0 + p * width_, d1, sums_of_copies);
          } else {
            multiply(piece, group, dy_rows, x, sums_of_copies, fetch);
          }
        }
        if (begin < end) {
          stage_dy(next, (turn + 1) % copies_, begin, end, dy(turn + 1) + (begin - block.begin) * padded_group_);
        }
        begin = end;
      }
    }
  }

  const float* coefficients(int64_t segment) const {
    return job_.args.c + job_.plan.segments[segment].weighting * w_.K;
  }

  // Where a group's columns end: what precedes them in their lines is mostly there.
  Fetch lines_of_dy(int64_t group, int64_t begin, int64_t end, int64_t times) const {
    const int64_t last = std::min(w_.N, (group + 1) * group_) - 1;
    return {dy_rows_.data() + begin, end - begin, last * (job_.dy.is_float() ? 4 : 2), 1,
            ceil_div(end - begin, std::max<int64_t>(times, 1)), true};
  }

  struct Sums {
    float* out;
    const float* scales;
    int64_t copies;
    bool add;
  };

  // sums = or += scales dy^T x over the piece's rows
  void multiply(const SegmentRows& piece, int64_t group, const float* dy_rows, const float* x, Sums sums,
                Fetch& fetch) const {
    const int64_t outputs = std::min(group_, w_.N - group * group_), rows = piece.end - piece.begin;
    for (int64_t m = 0; m < rows; m += kFusedTerms, sums.add = true) {
      kernels_.block_product({dy_rows + m * padded_group_, padded_group_, 0, true, outputs, x + m * width_, 0,
                              std::min(kFusedTerms, rows - m), width_, sums.add, sums.out, width_, 0, tile_,
                              sums.scales, sums.copies},
                             fetch);
    }
  }

  // The dots of a piece's product with the deltas, and what of it goes to the sums.
  void share_product(const SegmentRows& piece, int64_t group, int64_t d0, int64_t d1, const Sums& sums) {
    GradTile tile = tile_of(group, product_->get(), d0, d1);
    tile.dots = dots_.data() + group / unit_ * dots_each_ + piece.segment * w_.K;
    tile.deltas = w_.deltas;
    tile.deltas_dtype = w_.deltas_dtype;
    tile.first_delta = group * group_ * w_.K * w_.D + d0;
    tile.delta_row = w_.K * w_.D;
    tile.delta_copy = w_.D;
    kernels_.grad(tile);
    if (!has_target()) return;
    tile.dots = nullptr;
    tile.K = sums.copies;
    tile.c = sums.scales;
    tile.out = sums.out;
    tile.out_row = width_;
    tile.out_copy = tile_;
    tile.add = sums.add;
    kernels_.grad(tile);
  }

  bool has_target() const { return job_.floats || job_.rounded; }

  GradTile tile_of(int64_t group, const float* product, int64_t d0, int64_t d1) const {
    const int64_t outputs = std::min(group_, w_.N - group * group_);
    return {product, width_, outputs, std::min(width_, d1 - d0), w_.K};
  }

  // The finished sums of a group of outputs.
  void write(int64_t group, int64_t d0, int64_t d1, const float* sums) const {
    if (!has_target()) return;
    const int64_t outputs = std::min(group_, w_.N - group * group_);
    GradTile tile{};
    tile.g_step = sums_each_ * tile_;
    tile.K = is_one_sum_ ? w_.K : 1;
    tile.c = is_one_sum_ ? coefficients(0) : &kOne;
    tile.out = job_.floats ? job_.floats : job_.rounded;
    tile.out_dtype = job_.floats ? Dtype::f32 : w_.deltas_dtype;
    tile.out_copy = w_.D;
    tile.add = job_.floats && job_.add;
    tile.past_caches = past_caches_;
    for (int64_t j = 0; j < outputs; j++) {
      for (int64_t k = 0; k < sums_each_; k++) {
        tile.g = sums + k * tile_ + j * width_;
        tile.first_out = ((group * group_ + j) * w_.K + k) * w_.D + d0;
        write_row(kernels_, tile, d1 - d0);
      }
    }
  }

  // The group's columns of places [begin, end) of dy, side by side; by copy, times its coefficients.
  void stage_dy(int64_t group, int64_t copy, int64_t begin, int64_t end, float* out) const {
    std::vector<float> scales;
    for (int64_t m = begin; job_.by_copy && m < end; m++) {
      scales.push_back(job_.args.coefficients(job_.plan.row(m))[copy]);
    }
    const int64_t n0 = group * group_;
    kernels_.stage({job_.dy.data, job_.dy.dtype, order_, begin, end - begin, w_.N, n0, std::min(w_.N, n0 + group_),
                    padded_group_, job_.by_copy ? scales.data() : nullptr, out});
  }

  const DeltasGradient& job_;
  const Kernels& kernels_;
  const Weights& w_;
  const int64_t width_, group_, padded_group_, tile_, groups_;
  const int32_t* const order_;
  const bool past_caches_;
  const bool is_one_sum_;     // copies' gradients that differ by a factor have one sum
  const int64_t sums_each_;   // sums for a place of the weight
  const int64_t copies_;      // products for it
  const int64_t dots_each_;
  int64_t block_rows_ = 0, inputs_ = 0, sums_step_ = 0, sum_groups_ = 0, unit_ = 1;
  std::vector<const char*> dy_rows_;
  std::vector<SegmentRows> pieces_;
  std::vector<Range> parts_, blocks_;  // of pieces, of parts
  std::vector<double> dots_;
  const ThreadScratch *dy_ = nullptr, *x_ = nullptr, *product_ = nullptr, *sums_ = nullptr;
};

}  // namespace

void run_fused_gradient(const DeltasGradient& job) {
  const Weights& w = job.args.weights;
  if (w.N > 0 && w.D > 0) FusedGradient(job).run();
}

}  // namespace clp
