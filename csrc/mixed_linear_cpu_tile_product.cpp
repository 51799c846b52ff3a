// Many bfloat16 rows of each weighting on a processor that multiplies tiles: the base and the mix of a segment's copies
// are made into tiles a block at a time, and both products go into one float32 sum. The mix never exists whole, and is
// rounded by itself: rounded as one weight, a difference a thousandth of the base's size would lose half its effect.
// Where the caller allows that, both make one product.
#include "mixed_linear_cpu_tile_product.h"

#include <algorithm>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Bytes of rows that one pass over the weights takes, at most, for each thread. A block's terms and columns: with its
// sums they stay in the second-level cache.
constexpr int64_t kPassBytes = 1 << 21;
constexpr int64_t kLength = 256, kColumns = 256;
// Rows of one pass, at most: a block's sums make up 1 MiB.
constexpr int64_t kPassRows = 1024;

// Without a base none; of another dtype two, which keep 16 bits of it.
int base_parts(const Weights& weights) { return !weights.base ? 0 : weights.base_dtype == Dtype::bf16 ? 1 : 2; }

// Whether base and mix are rounded as one weight: pack_right takes them together where both are read as fast as that.
bool is_rounded(const Weights& weights, bool is_exact) {
  return !is_exact && base_parts(weights) == 1 && weights.deltas_dtype != Dtype::f16;
}

// Rows of one segment, packed from `tile` on.
struct Piece {
  int64_t m0, m1, segment, tile, tiles;
};

class Run {
 public:
  Run(const TileProductKernels& kernels, const Product& product)
      : kernels_(kernels),
        product_(product),
        weights_(product.args.weights),
        term_tiles_(ceil_div(product.length(), kernels.terms)),
        pass_tiles_(most_tiles()),
        length_(std::clamp(term_tiles_ * kernels.terms, kernels.terms, kLength)),
        is_rounded_(is_rounded(weights_, product.is_exact)),
        base_parts_(is_rounded_ ? 0 : base_parts(weights_)),
        mix_parts_(static_cast<int>(tile_parts(weights_, product.is_exact)) - base_parts_),
        part_size_(kColumns * length_),
        rows_(halves(pass_tiles_ * tile_size() * term_tiles_)),
        right_(halves((base_parts_ + mix_parts_) * part_size_)),
        sums_(pass_tiles_ * kernels.tile * kColumns) {}

  void run() {
    std::vector<Piece> pieces;
    int64_t tiles = 0;
    for (size_t g = 0; g < product_.segments.size(); g++) {
      const Segment& segment = product_.segments[g];
      for (int64_t m0 = segment.begin; m0 < segment.end;) {
        if (tiles == pass_tiles_) {
          run_pass(pieces);
          pieces.clear();
          tiles = 0;
        }
        const int64_t m1 = std::min(segment.end, m0 + (pass_tiles_ - tiles) * kernels_.tile);
        pieces.push_back({m0, m1, static_cast<int64_t>(g), tiles, ceil_div(m1 - m0, kernels_.tile)});
        tiles += pieces.back().tiles;
        m0 = m1;
      }
    }
    run_pass(pieces);
  }

 private:
  static int64_t halves(int64_t size) { return ceil_div(size, 2); }
  int64_t tile_size() const { return kernels_.tile * kernels_.terms; }

  // Of a pass: those of all rows, in passes of about equal size.
  int64_t most_tiles() const {
    const int64_t tile_bytes = tile_size() * 2 * std::max<int64_t>(term_tiles_, 1);
    const int64_t most = std::min(kPassBytes * num_threads() / tile_bytes, kPassRows / kernels_.tile);
    int64_t tiles = 0;
    for (const Segment& segment : product_.segments) tiles += ceil_div(segment.end - segment.begin, kernels_.tile);
    return ceil_div(tiles, ceil_div(tiles, std::max<int64_t>(most, 2)));
  }

  void run_pass(const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) {
      const int32_t* order = product_.plan.order.empty() ? nullptr : product_.plan.order.data() + piece.m0;
      const int64_t length = product_.length();
      const Bf16* values = static_cast<const Bf16*>(product_.a.data) + (order ? 0 : piece.m0 * length);
      const LeftTiles job{values, length, order, false, piece.m1 - piece.m0, length, row_tiles(piece.tile),
                          term_tiles_ * tile_size()};
      parallel(piece.tiles, kernels_.tile * length,
               [&](int64_t begin, int64_t end) { kernels_.pack_left(job, begin, end); });
    }
    // Shares of equal size for all threads.
    const int64_t columns = product_.columns(), threads = num_threads();
    const int64_t blocks = std::max<int64_t>(ceil_div(ceil_div(columns, kColumns), threads) * threads, 1);
    const int64_t width = ceil_div(ceil_div(columns, blocks), 2 * kernels_.tile) * 2 * kernels_.tile;
    parallel(ceil_div(columns, width), width * product_.length() * kernels_.tile, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        run_block(pieces, block * width, std::min(columns, (block + 1) * width));
      }
    });
  }

  Bf16* row_tiles(int64_t tile) const {
    return reinterpret_cast<Bf16*>(rows_.get()) + tile * tile_size() * term_tiles_;
  }

  void run_block(const std::vector<Piece>& pieces, int64_t j0, int64_t j1) {
    float* const sums = sums_.get();
    const int64_t length = product_.length(), column_tiles = ceil_div(j1 - j0, kernels_.tile);
    Bf16* const base = reinterpret_cast<Bf16*>(right_.get());
    for (int64_t i0 = 0; i0 < length || i0 == 0; i0 += length_) {
      const int64_t i1 = std::min(length, i0 + length_);
      const auto pack = [&](const Mix& mix, int parts, Bf16* out) {
        kernels_.pack_right({weights_, mix, product_.transposed, nullptr, j0, j1, i0, i1, parts, out, part_size_}, 0,
                            column_tiles);
      };
      if (base_parts_ > 0) pack({true, 0, nullptr, nullptr}, base_parts_, base);
      int64_t in_tiles = -1;
      for (const Piece& piece : pieces) {
        Mix copies = product_.terms[piece.segment].mix;
        copies.base = is_rounded_;
        const bool has_copies = copies.count > 0 || base_parts_ == 0;
        if (has_copies && in_tiles != piece.segment) pack(copies, mix_parts_, base + base_parts_ * part_size_);
        in_tiles = piece.segment;
        TileProduct job{row_tiles(piece.tile) + i0 * kernels_.tile, term_tiles_ * tile_size(), {}, 0, column_tiles,
                        ceil_div(i1 - i0, kernels_.terms), i0 > 0, sums + piece.tile * kernels_.tile * kColumns,
                        kColumns};
        job.parts = base_parts_ + (has_copies ? mix_parts_ : 0);
        for (int part = 0; part < job.parts; part++) job.right[part] = base + part * part_size_;
        kernels_.product(job, 0, piece.tiles);
      }
    }
    for (const Piece& piece : pieces) {
      product_.finish({piece.m0, piece.m1, j0, j1, sums + piece.tile * kernels_.tile * kColumns, kColumns});
    }
  }

  const TileProductKernels& kernels_;
  const Product& product_;
  const Weights& weights_;
  const int64_t term_tiles_, pass_tiles_, length_;
  const bool is_rounded_;
  const int base_parts_, mix_parts_;
  const int64_t part_size_;
  const Scratch rows_;
  const ThreadScratch right_, sums_;
};

}  // namespace

const TileProductKernels* tile_products_in_use() {
#ifdef CLP_AMX
  if (current_isa() == Isa::amx_bf16) return &tile_products_amx;
#endif
  return nullptr;
}

int64_t tile_parts(const Weights& weights, bool is_exact) {
  return is_rounded(weights, is_exact) ? 1 : base_parts(weights) + (weights.base ? 1 : 2);
}

void run_tile_product(const TileProductKernels& kernels, const Product& product) { Run(kernels, product).run(); }

}  // namespace clp
