// Both operands are packed: dy, whose columns become rows of tiles, once for a block of outputs where it has few rows;
// x, two rows of which become pairs, for each tile of the weight.
#include "mixed_linear_cpu_tile_gradient.h"

#include <algorithm>

namespace clp {

namespace {

// Rows of one product, and those up to which all of dy is packed at once: with a tile of 512 outputs 3.75 MiB.
constexpr int64_t kTileRows = 768, kPackedRows = 2048;

}  // namespace

TileMultiplier::TileMultiplier(const TileProductKernels* kernels, const Plan& plan, const Array& dy, const Array& x,
                               const Weights& w, int64_t outputs)
    : kernels_(kernels),
      plan_(plan),
      dy_(static_cast<const Bf16*>(dy.data)),
      x_(static_cast<const Bf16*>(x.data)),
      N_(w.N),
      D_(w.D),
      tiles_(0) {
  if (!kernels) return;
  for (const Segment& segment : plan.segments) {
    first_tiles_.push_back(tiles_);
    tiles_ += term_tiles(segment.end - segment.begin);
  }
  if (tiles_ > term_tiles(kPackedRows)) {
    first_tiles_.clear();
    tiles_ = term_tiles(kTileRows);
  }
  left_ = Scratch(outputs * tiles_ * kernels->terms / 2);
  right_ = Scratch(kInputs * kTileRows / 2);
}

void TileMultiplier::pack_dy(int64_t m0, int64_t m1, Bf16* out, int64_t step) const {
  const Bf16* first = dy_ + (order() ? 0 : m0 * N_) + n0_;
  const LeftTiles job{first, N_, order() ? order() + m0 : nullptr, true, n1_ - n0_, m1 - m0, out, step};
  parallel(ceil_div(n1_ - n0_, kernels_->tile), kernels_->tile * (m1 - m0),
           [&](int64_t begin, int64_t end) { kernels_->pack_left(job, begin, end); });
}

void TileMultiplier::start_outputs(int64_t n0, int64_t n1) {
  n0_ = n0;
  n1_ = n1;
  for (size_t g = 0; g < first_tiles_.size(); g++) {
    const Segment& segment = plan_.segments[g];
    pack_dy(segment.begin, segment.end, left_tiles(first_tiles_[g]), tiles_ * kernels_->tile * kernels_->terms);
  }
}

void TileMultiplier::run(size_t g, int64_t d0, int64_t d1, float* out, int64_t step) const {
  const Segment& segment = plan_.segments[g];
  const int64_t left_step = tiles_ * kernels_->tile * kernels_->terms, column_tiles = ceil_div(d1 - d0, kernels_->tile);
  Bf16* const right = reinterpret_cast<Bf16*>(right_.get());
  for (int64_t m0 = segment.begin; m0 < segment.end; m0 += kTileRows) {
    const int64_t m1 = std::min(segment.end, m0 + kTileRows);
    const Weights rows{x_, nullptr, Dtype::bf16, Dtype::bf16, m1, 0, D_};
    const RightTiles x{rows, {true, 0, nullptr, nullptr}, true, order(), d0, d1, m0, m1, 1, right, 0};
    parallel(column_tiles, kernels_->tile * (m1 - m0),
             [&](int64_t begin, int64_t end) { kernels_->pack_right(x, begin, end); });
    if (first_tiles_.empty()) pack_dy(m0, m1, left_tiles(0), left_step);
    const Bf16* left = left_tiles(first_tiles_.empty() ? 0 : first_tiles_[g] + term_tiles(m0 - segment.begin));
    const TileProduct job{left, left_step, {right}, 1, column_tiles, term_tiles(m1 - m0), m0 > segment.begin, out, step};
    parallel(ceil_div(n1_ - n0_, kernels_->tile), kernels_->tile * (m1 - m0) * (d1 - d0),
             [&](int64_t begin, int64_t end) { kernels_->product(job, begin, end); });
  }
}

}  // namespace clp
