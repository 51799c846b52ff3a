// The order in which mixed_linear's rows are worked on, and the way they are: decided by shapes and the row map alone.
#pragma once

#include <vector>

#include "mixed_linear_cpu.h"

namespace clp {

struct Plan {
  std::vector<int32_t> order;  // empty: rows stay where they are
  std::vector<Segment> segments;
};

// Rows grouped by weighting, in their own order within a group; untouched where equal weightings already lie side by side.
// Throws std::out_of_range for an entry of row_map outside [0, S).
Plan plan_rows(const int32_t* row_map, int64_t M, int64_t S);

enum class Path { stream, mixed_panels, concatenated_panels };

// The cheapest path of the forward (may_stream) or of the gradient of x.
Path choose_path(int64_t M, int64_t num_segments, int64_t K, bool has_base, bool may_stream);

}  // namespace clp
