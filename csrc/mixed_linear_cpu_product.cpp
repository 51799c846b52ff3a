// Many rows: panels of the mix, small enough for a cache, go straight into torch's product; the mix never exists whole.
#include <algorithm>

#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// A block of the mix: columns of the output by terms of the sum. Panel, rows and results make up at most 3.5 MiB a
// thread. Staged: where x's rows are widened, gathered or scaled first. The panel of two threads makes up 3 MiB: the C
// library may keep the forward's beside the backward's.
//
// Threads share a product by its columns, so several want more of them than one does. float32, 2048 x 2048, 512 rows,
// two Xeon threads, the whole weight in one product 14.2 ms: 256 columns by 2048 terms 16.3, 512 by 2048 14.8, 512 by
// 1024 15.4, 1024 by 1024 14.3 and by 768 the same; one thread, the whole 29.7, 256 by 2048 31.3, 1024 by 1024 30.8.
// Staged ones were not measured.
struct Block {
  int64_t columns, length;
};

Block block_of(bool is_staged) {
  if (num_threads() == 1) return is_staged ? Block{256, 1024} : Block{256, 3584};
  return is_staged ? Block{512, 1024} : Block{1024, 768};
}

constexpr int64_t kStagedRows = 512;

// The length of equal blocks, none above `most`; at least 1.
int64_t even_blocks(int64_t size, int64_t most) {
  return size == 0 ? 1 : ceil_div(size, ceil_div(size, most));
}

class Run {
 public:
  explicit Run(const Product& product)
      : product_(product),
        weights_(product.args.weights),
        is_staged_(!product.a.is_float() || !product.out || !product.plan.order.empty() ||
                   product.terms.back().row_scale >= 0),
        block_(block_of(is_staged_)),
        length_(even_blocks(product.length(), block_.length)),
        columns_(std::min(block_.columns, product.columns())),
        rows_(std::min(kStagedRows, product.args.M)),
        panel_(columns_ * length_),
        staged_(is_staged_ ? rows_ * length_ : 0),
        tile_(product.out ? 0 : rows_ * columns_) {}

  void run() {
    for (int64_t j0 = 0; j0 < product_.columns(); j0 += columns_) {
      const int64_t j1 = std::min(product_.columns(), j0 + columns_);
      for (size_t g = 0; g < product_.segments.size(); g++) {
        const Segment& segment = product_.segments[g];
        const int64_t step = is_staged_ ? rows_ : std::max<int64_t>(segment.end - segment.begin, 1);
        in_panel_ = nullptr;
        for (int64_t m0 = segment.begin; m0 < segment.end; m0 += step) {
          run_tile(&product_.terms[g * product_.terms_each], m0, std::min(segment.end, m0 + step), j0, j1);
        }
      }
    }
  }

 private:
  void run_tile(const Term* terms, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
    Tile tile{m0, m1, j0, j1, tile_.get(), j1 - j0};
    if (product_.out) {
      tile.data = product_.out + m0 * product_.columns() + j0;
      tile.step = product_.columns();
    }
    bool add = false;
    for (const Term* term = terms; term < terms + product_.terms_each; term++) {
      for (int64_t i0 = 0; i0 < product_.length() || i0 == 0; i0 += length_, add = true) {
        const int64_t i1 = std::min(product_.length(), i0 + length_);
        const Matrix out{tile.data, m1 - m0, j1 - j0, tile.step, 1};
        gemm(out, rows(*term, m0, m1, i0, i1), panel(*term, i0, i1, j0, j1), add);
      }
    }
    if (product_.finish) product_.finish(tile);
  }

  // The term's block as it is in memory, where it is one float32 stream, else its panel. Columns of it are columns of
  // out.
  Matrix panel(const Term& term, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t n0 = product_.transposed ? i0 : j0, n1 = product_.transposed ? i1 : j1;
    const int64_t d0 = product_.transposed ? j0 : i0, d1 = product_.transposed ? j1 : i1;
    const auto matrix = [&](const float* data, int64_t step) {
      return read_only(data, i1 - i0, j1 - j0, product_.transposed ? step : 1, product_.transposed ? 1 : step);
    };
    const Weights& w = weights_;
    const bool base_alone = term.mix.base && term.mix.count == 0, copy_alone = term.row_scale >= 0;
    if (base_alone && w.base_dtype == Dtype::f32) {
      return matrix(static_cast<const float*>(w.base) + n0 * w.D + d0, w.D);
    }
    if (copy_alone && w.deltas_dtype == Dtype::f32) {
      return matrix(static_cast<const float*>(w.deltas) + (n0 * w.K + term.row_scale) * w.D + d0, w.K * w.D);
    }
    if (in_panel_ != &term || first_in_panel_ != i0) {
      const Kernels& kernels = kernels_in_use();
      const int64_t step = d1 - d0;
      parallel(n1 - n0, step * (w.K + 1), [&](int64_t begin, int64_t end) {
        kernels.mix(w, term.mix, n0 + begin, n0 + end, d0, d1, panel_.get() + begin * step, step);
      });
      in_panel_ = &term;
      first_in_panel_ = i0;
    }
    return matrix(panel_.get(), d1 - d0);
  }

  // Rows of a in the order of work, as they are in memory or widened, gathered and scaled.
  Matrix rows(const Term& term, int64_t m0, int64_t m1, int64_t i0, int64_t i1) {
    const int64_t length = product_.length(), size = i1 - i0;
    const bool scaled = term.row_scale >= 0;
    if (product_.a.is_float() && product_.plan.order.empty() && !scaled) {
      return read_only(product_.a.floats() + m0 * length + i0, m1 - m0, size, length, 1);
    }
    const Kernels& kernels = kernels_in_use();
    parallel(m1 - m0, size, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) {
        const int64_t row = product_.plan.row(m0 + m);
        const float scale = scaled ? product_.args.coefficients(row)[term.row_scale] : 1.0f;
        kernels.widen(product_.a.data, product_.a.dtype, row * length + i0, size, scale, staged_.get() + m * size);
      }
    });
    return {staged_.get(), m1 - m0, size, size, 1};
  }

  const Product& product_;
  const Weights& weights_;
  const bool is_staged_;
  const Block block_;
  const int64_t length_, columns_, rows_;
  const Scratch panel_, staged_, tile_;
  const Term* in_panel_ = nullptr;
  int64_t first_in_panel_ = 0;
};

}  // namespace

void run_product(const Product& product) {
  switch (product.way) {
    case Way::torch:
      return Run(product).run();
    case Way::fused:
      return run_fused(product);
    case Way::tiles:
      return run_tile_product(*tile_products_in_use(), product);
  }
}

}  // namespace clp
