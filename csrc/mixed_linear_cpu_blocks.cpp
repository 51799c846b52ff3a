// Products in own blocks of a fixed size: the mix goes from memory into packed panels and from these into registers.
// For few rows of a weighting, where torch's product would pack a panel of the mix again for each; and where a row's
// bits must not depend on the number of rows or threads.
#include <algorithm>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Columns and terms of a block, and the segments whose mixes are made together, the weights read once for all: 256 KiB.
// Fewer columns where there are few in all, so that the threads' shares are even.
constexpr int64_t kColumns = 64, kFewColumns = 32, kWide = 1024, kLength = 128, kSegments = 8;
constexpr int64_t kLeastWidth = 8;  // of a panel, of the portable kernels
// Rows whose results are kept in scratch memory, and rows widened at once: at most 1 MiB and 128 KiB a thread.
constexpr int64_t kRows = 4096, kStagedRows = 256;

// Segments (of at most kRows rows) from `first` on, `rows` rows in all: what one pass over a block of weights serves.
struct Batch {
  size_t first, count;
  int64_t rows;
};

class Blocks {
 public:
  explicit Blocks(const Product& product)
      : product_(product),
        kernels_(kernels_in_use()),
        columns_(product.columns() < kWide ? kFewColumns : kColumns),
        is_staged_(!product.a.is_float() || !product.plan.order.empty() || product.terms.back().row_scale >= 0),
        tile_(std::min(kRows, product.args.M) * columns_),
        packed_(kSegments * columns_ * kLength),
        staged_(is_staged_ ? kStagedRows * kLength : 0),
        sums_(kernels_.group * columns_) {
    for (size_t g = 0; g < product.segments.size(); g++) {
      const Segment& segment = product.segments[g];
      for (int64_t m0 = segment.begin; m0 < segment.end; m0 += kRows) {
        const int64_t m1 = std::min(segment.end, m0 + kRows);
        add_piece({m0, m1, static_cast<int32_t>(g)});
      }
    }
  }

  void run() {
    const int64_t batches = static_cast<int64_t>(batches_.size());
    const int64_t items = ceil_div(product_.columns(), columns_) * batches;
    parallel(items, product_.args.M * columns_ * product_.length() / std::max<int64_t>(batches, 1),
             [&](int64_t begin, int64_t end) {
               for (int64_t item = begin; item < end; item++) run_batch(batches_[item % batches], item / batches);
             });
  }

 private:
  void add_piece(const Segment& piece) {
    const int64_t rows = piece.end - piece.begin;
    if (batches_.empty() || batches_.back().count == kSegments || batches_.back().rows + rows > kRows) {
      batches_.push_back({pieces_.size(), 0, 0});
    }
    pieces_.push_back(piece);
    batches_.back().count++;
    batches_.back().rows += rows;
  }

  void run_batch(const Batch& batch, int64_t block) {
    const int64_t j0 = block * columns_, j1 = std::min(product_.columns(), j0 + columns_);
    Tile tiles[kSegments];
    int64_t rows = 0;
    for (size_t s = 0; s < batch.count; s++) {
      const Segment& piece = pieces_[batch.first + s];
      tiles[s] = {piece.begin, piece.end, j0, j1, tile_.get() + rows * (j1 - j0), j1 - j0};
      rows += piece.end - piece.begin;
    }
    bool add = false;
    for (int64_t t = 0; t < product_.terms_each; t++) {
      for (int64_t i0 = 0; i0 < product_.length() || i0 == 0; i0 += kLength, add = true) {
        run_block(batch, tiles, t, i0, std::min(product_.length(), i0 + kLength), add);
      }
    }
    for (size_t s = 0; s < batch.count; s++) finish(tiles[s]);
  }

  // Sums are not kept in the output: rows a power of two apart share few places in a cache (AVX-512, one Xeon core, 504
  // rows of 2048 floats: 152 GFLOP/s so, 139 in place).
  void finish(Tile tile) {
    if (product_.out) {
      const int64_t columns = tile.j1 - tile.j0;
      float* out = product_.out + tile.m0 * product_.columns() + tile.j0;
      for (int64_t m = 0; m < tile.m1 - tile.m0; m++) {
        std::copy_n(tile.data + m * columns, columns, out + m * product_.columns());
      }
      tile.data = out;
      tile.step = product_.columns();
    }
    if (product_.finish) product_.finish(tile);
  }

  // Adds terms [i0, i1) of each segment's mix `t` to its tile.
  void run_block(const Batch& batch, const Tile* tiles, int64_t t, int64_t i0, int64_t i1, bool add) {
    const int64_t j0 = tiles[0].j0, j1 = tiles[0].j1, width = kernels_.panel_rows;
    const int64_t size = ceil_div(j1 - j0, width) * width;
    const Term* terms[kSegments];
    const Mix* mixes[kSegments];
    for (size_t s = 0; s < batch.count; s++) {
      terms[s] = &product_.terms[pieces_[batch.first + s].weighting * product_.terms_each + t];
      mixes[s] = &terms[s]->mix;
    }
    float* packed = packed_.get();
    const int64_t count = static_cast<int64_t>(batch.count);
    kernels_.mix_panels({product_.args.weights, mixes, count, product_.transposed, j0, j1, i0, i1, packed});
    for (int64_t s = 0; s < count; s++, packed += size * (i1 - i0)) multiply(tiles[s], *terms[s], i0, i1, packed, add);
  }

  void multiply(const Tile& tile, const Term& term, int64_t i0, int64_t i1, const float* packed, bool add) {
    const int64_t size = i1 - i0, columns = tile.j1 - tile.j0, step = is_staged_ ? kStagedRows : tile.m1 - tile.m0;
    const int64_t width = kernels_.panel_rows, num_panels = ceil_div(columns, width);
    Panel panels[kColumns / kLeastWidth];
    for (int64_t p = 0; p < num_panels; p++) panels[p] = {p * width, std::min(width, columns - p * width), nullptr};
    float* staged = staged_.get();
    for (int64_t m0 = tile.m0; m0 < tile.m1; m0 += step) {
      const int64_t m1 = std::min(tile.m1, m0 + step);
      for (int64_t m = m0; is_staged_ && m < m1; m++) {
        stage(term, product_.plan.row(m), i0, size, staged + (m - m0) * size);
      }
      const float* a = is_staged_ ? staged : product_.a.floats() + m0 * product_.length() + i0;
      float* out = tile.data + (m0 - tile.m0) * tile.step;
      kernels_.product({a, m1 - m0, size, is_staged_ ? size : product_.length(), 1, panels, num_panels, columns, packed,
                        add, out, tile.step},
                       0, ceil_div(m1 - m0, kernels_.group), sums_.get());
    }
  }

  // Terms of a row as floats, times the row's coefficient of the term.
  void stage(const Term& term, int64_t row, int64_t i0, int64_t size, float* out) const {
    const float scale = term.row_scale >= 0 ? product_.args.coefficients(row)[term.row_scale] : 1.0f;
    kernels_.widen(product_.a.data, product_.a.dtype, row * product_.length() + i0, size, scale, out);
  }

  const Product& product_;
  const Kernels& kernels_;
  const int64_t columns_;
  const bool is_staged_;
  const ThreadScratch tile_, packed_, staged_, sums_;
  std::vector<Segment> pieces_;  // their weighting: the index of the product's segment
  std::vector<Batch> batches_;
};

}  // namespace

void run_blocks(const Product& product) { Blocks(product).run(); }

}  // namespace clp
