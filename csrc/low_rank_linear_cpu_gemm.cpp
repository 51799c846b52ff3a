// Products by torch's own GEMM in blocks, where an argument must be widened or a result rounded.
#include <algorithm>

#include "cpu_gemm.h"
#include "low_rank_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::narrow;
using torch::stable::transpose;

// Floats of a staged block of rows for each thread, and of a tile of weights or of sums: 4 MiB in all for one thread.
// Rows are staged once, weights once for each block of rows.
constexpr int64_t kRowFloats = 1 << 19;
constexpr int64_t kTileFloats = 1 << 18;
constexpr int64_t kFewest = 32;

bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

bool is_float(const RowProduct& product) {
  return product.weight == nullptr || (is_float(*product.rows) && is_float(*product.weight));
}

int64_t length_of(const RowProduct& product) { return product.weight ? product.rows->size(1) : 0; }

// How many of `size` vectors of `length` fit in `floats`.
int64_t tile_size(int64_t floats, int64_t length, int64_t size) {
  return std::min(size, std::max(floats / std::max<int64_t>(length, 1), kFewest));
}

Tensor part(const Tensor& tensor, int64_t dim, int64_t start, int64_t size) {
  Tensor whole = tensor;
  return start == 0 && size == tensor.size(dim) ? whole : narrow(whole, dim, start, size);
}

// One tile of sum_of_products, of columns [start, start + out.size(1)), with float32 rows.
void sum_tile(Tensor& out, const Tensor* first_rows, const Tensor* first_weight, const Tensor* second_rows,
              const Tensor* second_weight, const Tensor* bias, bool by_input, int64_t start) {
  const auto weight_of = [&](const Tensor& weight) {
    const Tensor tile = as_float(part(weight, by_input ? 1 : 0, start, out.size(1)));
    return by_input ? tile : transpose(tile, 0, 1);
  };
  const Tensor bias_tile = bias ? as_float(part(*bias, 0, start, out.size(1))) : Tensor();
  bool accumulate = false;
  if (first_weight && bias) {
    gemm_with_bias(out, bias_tile, *first_rows, weight_of(*first_weight));
    accumulate = true;
  } else if (first_weight) {
    gemm(out, *first_rows, weight_of(*first_weight), false);
    accumulate = true;
  } else if (bias) {
    torch::stable::copy_(out, bias_tile);
    accumulate = true;
  }
  if (second_weight) gemm(out, *second_rows, weight_of(*second_weight), accumulate);
}

}  // namespace

Tensor as_float(const Tensor& tensor) {
  return is_float(tensor) ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

void sum_of_products(Tensor& out, const RowProduct& first, const RowProduct& second, const Tensor* bias,
                     bool by_input) {
  const int64_t M = out.size(0), columns = out.size(1);
  const bool whole = is_float(out) && is_float(first) && is_float(second) && (bias == nullptr || is_float(*bias));
  const int64_t length = std::max(length_of(first), length_of(second));
  const int64_t rows_each = whole ? M : tile_size(kRowFloats * num_threads(), length, M);
  const int64_t columns_each = whole ? columns : tile_size(kTileFloats, std::max(length, rows_each), columns);
  for (int64_t m = 0; m < M; m += rows_each) {
    const int64_t rows = std::min(rows_each, M - m);
    const Tensor first_rows = first.weight ? as_float(part(*first.rows, 0, m, rows)) : Tensor();
    const Tensor second_rows = second.weight ? as_float(part(*second.rows, 0, m, rows)) : Tensor();
    Tensor out_rows = part(out, 0, m, rows);
    for (int64_t j = 0; j < columns; j += columns_each) {
      Tensor target = part(out_rows, 1, j, std::min(columns_each, columns - j));
      Tensor tile = is_float(out) ? target
                                  : torch::stable::new_empty(target, {rows, target.size(1)}, ScalarType::Float);
      sum_tile(tile, &first_rows, first.weight, &second_rows, second.weight, bias, by_input, j);
      if (!is_float(out)) torch::stable::copy_(target, tile);
    }
  }
}

void product_over_rows(Tensor& out, const Tensor& a, const Tensor& b) {
  const int64_t M = a.size(0), A = a.size(1), B = b.size(1);
  const bool whole = is_float(out) && is_float(a) && is_float(b);
  const int64_t columns_each = whole ? A : tile_size(kTileFloats, std::max<int64_t>(B, 256), A);
  const int64_t rows_fit =
      std::min(tile_size(kRowFloats * num_threads(), B, M), tile_size(kTileFloats, columns_each, M));
  const int64_t rows_each = std::max<int64_t>(whole ? M : rows_fit, 1);
  for (int64_t j = 0; j < A; j += columns_each) {
    const int64_t columns = std::min(columns_each, A - j);
    Tensor target = part(out, 0, j, columns);
    Tensor sum = is_float(out) ? target : torch::stable::new_empty(target, {columns, B}, ScalarType::Float);
    for (int64_t m = 0; m < std::max<int64_t>(M, 1); m += rows_each) {  // an empty batch's product is zero
      const int64_t rows = std::min(rows_each, M - m);
      const Tensor a_rows = as_float(part(part(a, 0, m, rows), 1, j, columns));
      gemm(sum, transpose(a_rows, 0, 1), as_float(part(b, 0, m, rows)), m > 0);
    }
    if (!is_float(out)) torch::stable::copy_(target, sum);
  }
}

}  // namespace clp
