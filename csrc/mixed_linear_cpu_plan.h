// The order in which mixed_linear's rows are worked on, and the way they are: decided by shapes and the row map alone.
#pragma once

#include <vector>

#include "mixed_linear_cpu.h"

namespace clp {

struct Plan {
  std::vector<int32_t> order;  // order of work -> row; empty: rows stay where they are
  std::vector<Segment> segments;

  int64_t row(int64_t at) const { return order.empty() ? at : order[at]; }
};

// Rows grouped by weighting, in their own order within a group; untouched where equal weightings already lie side by
// side. Throws std::out_of_range for an entry of row_map outside [0, S).
Plan plan_rows(const int32_t* row_map, int64_t M, int64_t S);

// The copies that each segment reads: those whose coefficient is zero are left out.
class Mixes {
 public:
  Mixes(const Plan& plan, const float* c_SK, int64_t K, bool has_base);
  const Mix& of_segment(int64_t segment) const { return mixes_[segment]; }
  // All that some row reads.
  const Mix& any() const { return any_; }

 private:
  std::vector<int32_t> copies_, any_copies_;
  std::vector<float> c_;
  std::vector<Mix> mixes_;
  Mix any_;
};

// Whether the streams' products are cheaper formed each for itself, for all rows, than the mix of each segment.
// The forward does so in its own kernel, the gradient of x for the most part by torch's products, which cost more for
// few rows.
bool streams_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, bool own_kernel);

// Whether the streams' products are cheaper each for itself by tiles of bfloat16, `num_products` of them: a stream of
// another dtype takes two.
bool tiles_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, int64_t num_products);

// Whether tiles of each segment's mix, of `num_parts` bfloat16s for each weight, are cheaper than that, or, where
// num_products is 0 because no kernel does that, than everything else.
bool tile_mixes_are_cheaper(int64_t M, int64_t num_segments, int64_t num_streams, int64_t num_parts,
                            int64_t num_products);

// Whether so few rows share a weighting that the own product, which mixes as it goes, takes less time than torch's,
// which packs the mix of each segment anew.
bool forward_is_fused(int64_t M, int64_t num_segments);
bool backward_x_is_fused(int64_t M, int64_t num_segments);
bool gradient_is_fused(int64_t M, int64_t num_segments);

// Whether one weight gradient for each copy is cheaper than one for each segment, spread over the copies.
bool copies_are_cheaper(int64_t M, int64_t num_segments, int64_t K);

}  // namespace clp
