// Rows in blocks, and weights that are mixed as a block's products take them: a few rows of weights at a time, the next
// ones fetched in the course of the products. What the own products of mixed_linear and of the head share.
#pragma once

#include <functional>
#include <vector>

#include "mixed_linear_cpu_ops.h"

namespace clp {

// Terms of a sum that are multiplied at once, at most.
constexpr int64_t kFusedTerms = 256;

// The length of equal blocks of a multiple of `unit`, none above `most`.
int64_t even_blocks(int64_t size, int64_t most, int64_t unit);

// Rows of one segment, and the place of their results, which starts a panel.
struct Piece {
  int64_t begin, end, place;
  size_t segment;

  int64_t rows() const { return end - begin; }
};

// Pieces whose mixes are made together, and their places.
struct Block {
  size_t first, count;
  int64_t place, places;
};

struct RowBlocks {
  RowBlocks(const std::vector<Segment>& segments, int64_t panel);
  int64_t most_places() const;  // of a block

  std::vector<Piece> pieces;
  std::vector<Block> blocks;
  int64_t places = 0;
};

// Outputs [n0, n1) by inputs [d0, d1) of the mixes of term t.
struct Slice {
  int64_t t, n0, n1, d0, d1;
};

// The mixes of one block's pieces.
class BlockMixes {
 public:
  // mixes[t * block.count + s]: of piece s in term t. `terms` of a sum at once.
  BlockMixes(const Weights& weights, const RowBlocks& rows, const Block& block, std::vector<const Mix*> mixes,
             int64_t terms);

  // Floats that by_outputs and by_inputs want of a thread, for inputs [0, D).
  static int64_t outputs_scratch(int64_t terms, size_t pieces);
  static int64_t inputs_scratch(int64_t terms, size_t pieces, int64_t D);

  // For each block of terms `begin`, and after it for each group of outputs [n0, n1) `product` with each piece:
  // mix [group, d1 - d0], which takes what it fetches along.
  void by_outputs(int64_t n0, int64_t n1, float* scratch, const std::function<void(const Slice&)>& begin,
                  const std::function<void(const Piece&, const Slice&, const float* mix, Fetch&)>& product) const;

  // For each block of terms `begin`, and after it for some panels of inputs [d0, d1) at a time `product` with a
  // piece's rows [m, m + rows): panels [d, n1 - n0, panel_rows]. At most `group` rows, none from two panels of places.
  void by_inputs(int64_t d0, int64_t d1, int64_t group, int64_t panel, float* scratch,
                 const std::function<void(const Slice&)>& begin,
                 const std::function<void(const Piece&, int64_t m, int64_t rows, const Slice&, const float* panels,
                                          Fetch&)>& product) const;

 private:
  std::vector<Slice> list_passes(int64_t d0, int64_t d1) const;
  void mix(const Slice& pass, int64_t begin, int64_t end, float* panels) const;
  Fetch lines(std::vector<const char*>& rows, const Mix& mix, int64_t n0, int64_t n1, int64_t d0, int64_t d1) const;
  const Mix* const* mixes_of(int64_t t) const { return mixes_.data() + t * block_.count; }
  bool list_same_copies(int64_t t) const;

  const Weights& w_;
  const RowBlocks& rows_;
  const Block& block_;
  const std::vector<const Mix*> mixes_;
  const int64_t terms_, num_terms_, count_;
  const Kernels& kernels_;
};

// One row of a gradient from sums in panels, tile.g_step apart: `columns` of it, side by side. Tile after tile, each
// would be of as many rows, and pages, as a group has.
void write_row(const Kernels& kernels, GradTile tile, int64_t columns);

}  // namespace clp
