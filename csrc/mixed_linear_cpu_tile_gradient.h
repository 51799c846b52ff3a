// The weight gradient of bfloat16 rows by tiles, a tile of the weight and a segment at a time.
#pragma once

#include <vector>

#include "mixed_linear_cpu_ops.h"
#include "mixed_linear_cpu_tile_product.h"

namespace clp {

// out = dy^T x of one segment, by tiles of bfloat16.
class TileMultiplier {
 public:
  static constexpr int64_t kInputs = 512;

  // Of tiles of up to `outputs` by kInputs; without kernels nothing is kept for it.
  TileMultiplier(const TileProductKernels* kernels, const Plan& plan, const Array& dy, const Array& x, const Weights& w,
                 int64_t outputs);
  explicit operator bool() const { return kernels_ != nullptr; }
  // Before the products of outputs [n0, n1).
  void start_outputs(int64_t n0, int64_t n1);
  // Segment g, inputs [d0, d1); out in whole tiles.
  void run(size_t g, int64_t d0, int64_t d1, float* out, int64_t step) const;

 private:
  int64_t term_tiles(int64_t rows) const { return ceil_div(rows, kernels_->terms); }
  Bf16* left_tiles(int64_t term_tile) const {
    return reinterpret_cast<Bf16*>(left_.get()) + term_tile * kernels_->tile * kernels_->terms;
  }
  const int32_t* order() const { return plan_.order.empty() ? nullptr : plan_.order.data(); }
  // dy's places [m0, m1) as tiles of outputs, from `out` on, `step` from one to the next.
  void pack_dy(int64_t m0, int64_t m1, Bf16* out, int64_t step) const;

  const TileProductKernels* const kernels_;
  const Plan& plan_;
  const Bf16 *const dy_, *const x_;
  const int64_t N_, D_;
  std::vector<int64_t> first_tiles_;  // of terms of each segment, where all rows are packed at once; else empty
  int64_t tiles_;                     // of terms that a tile of packed outputs has
  Scratch left_, right_;
  int64_t n0_ = 0, n1_ = 0;
};

}  // namespace clp
