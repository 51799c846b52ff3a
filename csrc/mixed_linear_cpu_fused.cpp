// Forward and gradient of x in own blocks: weights go from memory into a block of their mixes and from there into
// registers. Rows of weights are mixed as they lie in memory, so none are transposed: the forward multiplies them by
// packed rows of x and turns its results, the gradient of x takes them as packed panels. A sum's order of terms depends
// on its length alone.
#include <algorithm>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Rows that are worked on together, and a thread's columns of their results: 512 by 1024 sums are 2 MiB. Terms of a
// block. Mixes that are made together, and the floats that their panels take in the gradient of x, at most kPanels of
// each; twice, for those of the next pass.
constexpr int64_t kBlockRows = 512, kBlockColumns = 1024, kTerms = 256, kMixes = 8, kMixFloats = 1 << 17, kPanels = 8;

// The length of equal blocks of a multiple of `unit`, none above `most`.
int64_t even_blocks(int64_t size, int64_t most, int64_t unit) {
  return size == 0 ? unit : ceil_div(ceil_div(size, ceil_div(size, most)), unit) * unit;
}

// Rows of one segment, and the place of their results among the block's, which starts a panel.
struct Piece {
  int64_t begin, end, at;
  size_t segment;

  int64_t rows() const { return end - begin; }
};

// Pieces whose mixes are made together.
struct Block {
  size_t first, count;
  int64_t places;
};

class Fused {
 public:
  explicit Fused(const Product& product)
      : product_(product),
        kernels_(kernels_in_use()),
        w_(product.args.weights),
        width_(kernels_.panel_rows),
        group_(kernels_.group),
        terms_(even_blocks(product.length(), kTerms, width_ / 2)) {
    list_blocks();
    unit_ = product.transposed ? width_ : group_;
    units_ = ceil_div(product.columns(), unit_);
    most_units_ = std::min(units_, kBlockColumns / unit_);
  }

  void run() {
    for (const Block& block : blocks_) most_places_ = std::max(most_places_, block.places);
    // The forward's sums lie the other way round. Rows of them are no power of two apart.
    out_step_ = (product_.transposed ? most_units_ * unit_ : most_places_) + 16;
    const int64_t sums = (product_.transposed ? most_places_ : most_units_ * unit_) * out_step_;
    const int64_t turned = product_.transposed || product_.out ? 0 : width_ * most_units_ * unit_;
    const int64_t mixed_columns = product_.transposed ? std::min(kPanels * unit_, units_ * unit_) : group_;
    mix_floats_ = std::min<int64_t>(kMixFloats, mixed_columns * terms_ * std::min<int64_t>(kMixes, pieces_.size()));
    const ThreadScratch rows(std::max(most_places_ * terms_, turned)), out(sums), widened(width_ * terms_);
    const ThreadScratch mixed((product_.transposed ? 2 : 1) * mix_floats_);
    rows_ = &rows;
    mixed_ = &mixed;
    out_ = &out;
    widened_ = &widened;
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    parallel(blocks * units_, product_.args.M * unit_ * product_.length() / std::max<int64_t>(blocks, 1),
             [&](int64_t begin, int64_t end) {
               while (begin < end) {
                 const int64_t first = begin % units_, count = std::min({end - begin, units_ - first, most_units_});
                 const int64_t last = std::min(product_.columns(), (first + count) * unit_);
                 run_columns(blocks_[begin / units_], first * unit_, last);
                 begin += count;
               }
             });
  }

 private:
  void list_blocks() {
    for (size_t g = 0; g < product_.segments.size(); g++) {
      const Segment& segment = product_.segments[g];
      const int64_t step = even_blocks(segment.end - segment.begin, kBlockRows, width_);
      for (int64_t m0 = segment.begin; m0 < segment.end; m0 += step) {
        add_piece({m0, std::min(segment.end, m0 + step), 0, g});
      }
    }
  }

  void add_piece(Piece piece) {
    const int64_t places = ceil_div(piece.rows(), width_) * width_;
    if (blocks_.empty() || blocks_.back().count == kMixes || blocks_.back().places + places > kBlockRows) {
      blocks_.push_back({pieces_.size(), 0, 0});
    }
    piece.at = blocks_.back().places;
    pieces_.push_back(piece);
    blocks_.back().count++;
    blocks_.back().places += places;
  }

  const Term& term(const Piece& piece, int64_t t) const {
    return product_.terms[piece.segment * product_.terms_each + t];
  }

  void run_columns(const Block& block, int64_t j0, int64_t j1) {
    product_.transposed ? backward(block, j0, j1) : forward(block, j0, j1);
    for (size_t s = 0; s < block.count; s++) finish(pieces_[block.first + s], j0, j1);
  }

  // Terms [i0, i1) of the block's rows: packed panels for the forward, rows for the gradient of x.
  void stage(const Block& block, int64_t t, int64_t i0, int64_t i1) const {
    const Array& a = product_.a;
    const int64_t size = i1 - i0, length = product_.length();
    const int32_t* order = product_.plan.order.empty() ? nullptr : product_.plan.order.data();
    for (const Piece* piece = &pieces_[block.first]; piece < &pieces_[block.first] + block.count; piece++) {
      float* out = rows_->get() + piece->at * size;
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

  static bool list_same_copies(const std::vector<const Mix*>& mixes) {
    for (const Mix* mix : mixes) {
      if (mix->count != mixes[0]->count || !std::equal(mix->copies, mix->copies + mix->count, mixes[0]->copies)) {
        return false;
      }
    }
    return true;
  }

  std::vector<const Mix*> mixes_of(const Block& block, int64_t t) const {
    std::vector<const Mix*> mixes;
    for (size_t s = 0; s < block.count; s++) mixes.push_back(&term(pieces_[block.first + s], t).mix);
    return mixes;
  }

  // sums[n, place] += <weights n, rows>, group after group of outputs
  void forward(const Block& block, int64_t n0, int64_t n1) {
    const std::vector<const Mix*> mixes = mixes_of(block, 0);
    const int64_t mix_step = group_ * terms_;
    const bool same = list_same_copies(mixes);
    float *mixed = mixed_->get(), *out = out_->get();
    std::vector<const char*> next;
    for (int64_t d0 = 0; d0 < w_.D || d0 == 0; d0 += terms_) {
      const int64_t d1 = std::min(w_.D, d0 + terms_), size = d1 - d0;
      stage(block, 0, d0, d1);
      for (int64_t n = n0; n < n1; n += group_) {
        const int64_t end = std::min(n1, n + group_);
        kernels_.mix_blocks({w_, mixes.data(), static_cast<int64_t>(mixes.size()), same, n, end, d0, d1, size, false,
                             mixed, mix_step, 0, size});
        Fetch fetch = end < n1 ? lines(next, *mixes[0], end, std::min(n1, end + group_), d0, d1)
                               : lines(next, *mixes[0], n0, std::min(n1, n0 + group_), d1, std::min(w_.D, d1 + terms_));
        spread(fetch, block.places / width_, size);
        for (size_t s = 0; s < block.count; s++) {
          const Piece& piece = pieces_[block.first + s];
          kernels_.block_product({mixed + s * mix_step, size, false, end - n, rows_->get() + piece.at * size,
                                  width_ * size, size, piece.rows(), d0 > 0, out + (n - n0) * out_step_ + piece.at,
                                  out_step_},
                                 fetch);
        }
      }
    }
  }

  // Panels of the mixes for one pass over the block's rows: outputs [n0, n1) of term `t`, inputs [d0, d1).
  struct Pass {
    int64_t t, n0, n1, d0, d1;
  };

  std::vector<Pass> list_passes(const Block& block, int64_t d0, int64_t d1) const {
    const int64_t floats = width_ * terms_ * static_cast<int64_t>(block.count);
    const int64_t inputs = std::clamp<int64_t>(kMixFloats / floats, 1, kPanels) * width_;
    std::vector<Pass> passes;
    for (int64_t t = 0; t < product_.terms_each; t++) {
      for (int64_t n = 0; n < w_.N || n == 0; n += terms_) {
        for (int64_t d = d0; d < d1; d += inputs) {
          passes.push_back({t, n, std::min(w_.N, n + terms_), d, std::min(d1, d + inputs)});
        }
      }
    }
    return passes;
  }

  // Outputs [begin, end) of a pass, into its panels.
  void mix(const std::vector<const Mix*>& mixes, const Pass& pass, int64_t begin, int64_t end, float* panels) const {
    const int64_t panel = width_ * (pass.n1 - pass.n0), step = ceil_div(pass.d1 - pass.d0, width_) * panel;
    kernels_.mix_blocks({w_, mixes.data(), static_cast<int64_t>(mixes.size()), list_same_copies(mixes), begin, end,
                         pass.d0, pass.d1, width_, true, panels + (begin - pass.n0) * width_, step, panel, width_});
  }

  // sums[place, d] += <rows, weights d>. The next pass's panels are mixed a few outputs at a time between the products
  // of this one, which fetch them: all at once they are more than the second-level cache holds of rows a power of two
  // apart.
  void backward(const Block& block, int64_t d0, int64_t d1) {
    const std::vector<Pass> passes = list_passes(block, d0, d1);
    int64_t groups = 0;
    for (size_t s = 0; s < block.count; s++) groups += ceil_div(pieces_[block.first + s].rows(), group_);
    std::vector<std::vector<const Mix*>> mixes;
    for (int64_t t = 0; t < product_.terms_each; t++) mixes.push_back(mixes_of(block, t));
    mix(mixes[0], passes[0], passes[0].n0, passes[0].n1, mixed_->get());
    std::vector<const char*> rows;
    for (size_t i = 0; i < passes.size(); i++) {
      const Pass& pass = passes[i];
      if (pass.d0 == d0) stage(block, pass.t, pass.n0, pass.n1);
      const Pass* next = i + 1 < passes.size() ? &passes[i + 1] : nullptr;
      const int64_t size = pass.n1 - pass.n0, panel = width_ * size;
      const int64_t panels = ceil_div(pass.d1 - pass.d0, width_);
      const int64_t slice = next ? ceil_div(next->n1 - next->n0, groups) : 0;
      const float* mixed = mixed_->get() + i % 2 * mix_floats_;
      int64_t begin = next ? next->n0 : 0;
      for (size_t s = 0; s < block.count; s++) {
        const Piece& piece = pieces_[block.first + s];
        for (int64_t m = 0; m < piece.rows(); m += group_) {
          const int64_t end = next ? std::min(next->n1, begin + slice) : 0;
          Fetch fetch = lines(rows, next ? term(piece, next->t).mix : Mix{}, begin, end, next ? next->d0 : 0,
                              next ? next->d1 : 0);
          spread(fetch, panels, size);
          kernels_.block_product({rows_->get() + (piece.at + m) * size, size, false, std::min(group_, piece.rows() - m),
                                  mixed + s * panels * panel, panel, size, pass.d1 - pass.d0, pass.t > 0 || pass.n0 > 0,
                                  out_->get() + (piece.at + m) * out_step_ + pass.d0 - d0, out_step_},
                                 fetch);
          if (begin < end) mix(mixes[next->t], *next, begin, end, mixed_->get() + (i + 1) % 2 * mix_floats_);
          begin = end;
        }
      }
    }
  }

  // The lines of a block of the streams that `mix` reads.
  Fetch lines(std::vector<const char*>& rows, const Mix& mix, int64_t n0, int64_t n1, int64_t d0, int64_t d1) const {
    rows.clear();
    if (n0 >= n1 || d0 >= d1) return {nullptr, 0, 0, 1, 0};
    const int64_t base_size = w_.base_dtype == Dtype::f32 ? 4 : 2, delta_size = w_.deltas_dtype == Dtype::f32 ? 4 : 2;
    for (int64_t n = n0; n < n1; n++) {
      if (mix.base) rows.push_back(static_cast<const char*>(w_.base) + (n * w_.D + d0) * base_size);
      for (int64_t a = 0; a < mix.count; a++) {
        const int64_t first = (n * w_.K + mix.copies[a]) * w_.D + d0;
        rows.push_back(static_cast<const char*>(w_.deltas) + first * delta_size);
      }
    }
    const int64_t bytes = (d1 - d0) * (mix.count ? delta_size : base_size);
    return {rows.data(), static_cast<int64_t>(rows.size()), 0, ceil_div(bytes, kLine), 0};
  }

  // All lines in the course of `tiles` products of `steps` terms, some every 16 terms.
  static void spread(Fetch& fetch, int64_t tiles, int64_t steps) {
    fetch.at_once = ceil_div(fetch.num_rows * fetch.lines, std::max<int64_t>(tiles * ceil_div(steps, 16), 1));
  }

  void finish(const Piece& piece, int64_t j0, int64_t j1) {
    const int64_t columns = j1 - j0;
    float* sums = out_->get() + piece.at * (product_.transposed ? out_step_ : 1);
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
        tile.data = rows_->get();  // all their products are made
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
  int64_t most_places_ = 0, out_step_ = 0, mix_floats_ = 0;
  std::vector<Piece> pieces_;
  std::vector<Block> blocks_;
  const ThreadScratch *rows_ = nullptr, *mixed_ = nullptr, *out_ = nullptr, *widened_ = nullptr;
};

}  // namespace

void run_fused(const Product& product) { Fused(product).run(); }

}  // namespace clp
