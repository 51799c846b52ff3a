// Forward and gradient of x in own blocks: weights go from memory into a block of their mixes and from there into
// registers. Rows of weights are mixed as they lie in memory, so none are transposed: the forward multiplies them by
// packed rows of x and turns its results, the gradient of x takes them as packed panels. A sum's order of terms depends
// on its length alone.
#include <algorithm>
#include <limits>
#include <utility>

#include "mixed_linear_cpu_blocks.h"

namespace clp {

namespace {

// A thread's columns of a block's results: 512 by 1024 sums are 2 MiB.
constexpr int64_t kBlockColumns = 1024;

// Rows that lie side by side, however many.
constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();

class Fused {
 public:
  explicit Fused(const Product& product)
      : product_(product),
        kernels_(kernels_in_use()),
        w_(product.args.weights),
        width_(kernels_.panel_rows),
        group_(kernels_.group),
        terms_(even_blocks(product.length(), kFusedTerms, width_ / 2)),
        rows_(product.segments, width_) {
    unit_ = product.transposed ? width_ : group_;
    units_ = ceil_div(product.columns(), unit_);
    most_units_ = std::min(units_, kBlockColumns / unit_);
  }

  void run() {
    const int64_t places = rows_.most_places(), columns = most_units_ * unit_;
    // The forward's sums lie the other way round. Rows of them are no power of two apart.
    out_step_ = (product_.transposed ? columns : places) + 16;
    const int64_t turned = product_.transposed || product_.out ? 0 : width_ * columns;
    const ThreadScratch staged(std::max(places * terms_, turned)), widened(width_ * terms_);
    const ThreadScratch out((product_.transposed ? places : columns) * out_step_);
    const ThreadScratch mixed(product_.transposed
                                  ? BlockMixes::inputs_scratch(terms_, rows_.pieces.size(), product_.columns())
                                  : BlockMixes::outputs_scratch(terms_, rows_.pieces.size()));
    staged_ = &staged;
    mixed_ = &mixed;
    out_ = &out;
    widened_ = &widened;
    const int64_t blocks = static_cast<int64_t>(rows_.blocks.size());
    parallel(blocks * units_, product_.args.M * unit_ * product_.length() / std::max<int64_t>(blocks, 1),
             [&](int64_t begin, int64_t end) {
               while (begin < end) {
                 const int64_t first = begin % units_, count = std::min({end - begin, units_ - first, most_units_});
                 const int64_t last = std::min(product_.columns(), (first + count) * unit_);
                 run_columns(rows_.blocks[begin / units_], first * unit_, last);
                 begin += count;
               }
             });
  }

 private:
  const Term& term(const Piece& piece, int64_t t) const {
    return product_.terms[piece.segment * product_.terms_each + t];
  }

  void run_columns(const Block& block, int64_t j0, int64_t j1) {
    product_.transposed ? backward(block, j0, j1) : forward(block, j0, j1);
    for (size_t s = 0; s < block.count; s++) finish(block, rows_.pieces[block.first + s], j0, j1);
  }

  // Terms [i0, i1) of the block's rows: packed panels for the forward, rows for the gradient of x.
  void stage(const Block& block, int64_t t, int64_t i0, int64_t i1) const {
    const Array& a = product_.a;
    const int64_t size = i1 - i0, length = product_.length();
    const int32_t* order = product_.plan.order.empty() ? nullptr : product_.plan.order.data();
    for (size_t s = 0; s < block.count; s++) {
      const Piece* piece = &rows_.pieces[block.first + s];
      float* out = staged_->get() + (piece->place - block.place) * size;
      if (product_.transposed) {
        std::vector<float> scales;
        const int64_t copy = term(*piece, t).row_scale;
        for (int64_t m = piece->begin; copy >= 0 && m < piece->end; m++) {
          scales.push_back(product_.args.coefficients(product_.plan.row(m))[copy]);
        }
        kernels_.stage({a.data, a.dtype, order, piece->begin, piece->rows(), length, i0, i1, size,
                        copy >= 0 ? scales.data() : nullptr, out});
        continue;
      }
      for (int64_t m = piece->begin; m < piece->end; m += width_, out += width_ * size) {
        const int64_t count = std::min(width_, piece->end - m);
        if (a.is_float() && !order) {
          kernels_.pack(a.floats() + m * length + i0, count, size, length, out);
          continue;
        }
        kernels_.stage({a.data, a.dtype, order, m, count, length, i0, i1, size, nullptr, widened_->get()});
        kernels_.pack(widened_->get(), count, size, size, out);
      }
    }
  }

  BlockMixes mixes_of(const Block& block) const {
    std::vector<const Mix*> mixes;
    for (int64_t t = 0; t < product_.terms_each; t++) {
      for (size_t s = 0; s < block.count; s++) mixes.push_back(&term(rows_.pieces[block.first + s], t).mix);
    }
    return {w_, rows_, block, std::move(mixes), terms_};
  }

  // sums[n, place] += <weights n, rows>, group after group of outputs
  void forward(const Block& block, int64_t n0, int64_t n1) {
    const float* staged = staged_->get();
    float* out = out_->get();
    mixes_of(block).by_outputs(
        n0, n1, mixed_->get(), [&](const Slice& slice) { stage(block, slice.t, slice.d0, slice.d1); },
        [&](const Piece& piece, const Slice& slice, const float* mix, Fetch& fetch) {
          const int64_t size = slice.d1 - slice.d0;
          const int64_t place = piece.place - block.place;
          float* to = out + (slice.n0 - n0) * out_step_ + place;
          kernels_.block_product({mix, size, width_, false, slice.n1 - slice.n0, staged + place * size, width_ * size,
                                  size, piece.rows(), slice.d0 > 0, to, out_step_, width_},
                                 fetch);
        });
  }

  // sums[place, d] += <rows, weights d>
  void backward(const Block& block, int64_t d0, int64_t d1) {
    const float* staged = staged_->get();
    float* out = out_->get();
    mixes_of(block).by_inputs(
        d0, d1, group_, kAnyRows, mixed_->get(),
        [&](const Slice& slice) { stage(block, slice.t, slice.n0, slice.n1); },
        [&](const Piece& piece, int64_t m, int64_t rows, const Slice& slice, const float* panels, Fetch& fetch) {
          const int64_t size = slice.n1 - slice.n0, place = piece.place - block.place + m;
          float* to = out + place * out_step_ + slice.d0 - d0;
          kernels_.block_product({staged + place * size, size, width_, false, rows, panels, width_ * size, size,
                                  slice.d1 - slice.d0, slice.t > 0 || slice.n0 > 0, to, out_step_, width_},
                                 fetch);
        });
  }

  void finish(const Block& block, const Piece& piece, int64_t j0, int64_t j1) {
    const int64_t columns = j1 - j0;
    float* sums = out_->get() + (piece.place - block.place) * (product_.transposed ? out_step_ : 1);
    for (int64_t m = piece.begin; m < piece.end; m += width_) {
      const int64_t rows = std::min(width_, piece.end - m), first = m - piece.begin;
      Tile tile{m, m + rows, j0, j1, nullptr, columns};
      if (product_.out) {
        tile.data = product_.out + m * product_.columns() + j0;
        tile.step = product_.columns();
      } else if (product_.transposed) {
        tile.data = sums + first * out_step_;
        tile.step = out_step_;
      } else {
        tile.data = staged_->get();  // all their products are made
      }
      if (!product_.transposed) {
        kernels_.turn(sums + first, out_step_, columns, rows, tile.data, tile.step);
      } else if (product_.out) {
        for (int64_t i = 0; i < rows; i++) {
          std::copy_n(sums + (first + i) * out_step_, columns, tile.data + i * tile.step);
        }
      }
      if (product_.finish) product_.finish(tile);
    }
  }

  const Product& product_;
  const Kernels& kernels_;
  const Weights& w_;
  const int64_t width_, group_, terms_;
  int64_t unit_ = 1, units_ = 0, most_units_ = 0;  // columns that one thread takes at least
  const RowBlocks rows_;
  int64_t out_step_ = 0;
  const ThreadScratch *staged_ = nullptr, *mixed_ = nullptr, *out_ = nullptr, *widened_ = nullptr;
};

}  // namespace

void run_fused(const Product& product) { Fused(product).run(); }

}  // namespace clp
