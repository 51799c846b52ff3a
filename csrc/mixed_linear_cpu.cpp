// mixed_linear on the CPU: forward and gradient of x, each in the way that suits the rows.
//
//   bfloat16 rows, on tiles             one product for each stream, read once      mixed_linear_cpu_tiles.cpp
//   many of each weighting, on tiles    the base and each mix, block by block       mixed_linear_cpu_tile_product.cpp
//   few rows, or rows that all differ   every stream read once, one sum for each    mixed_linear_cpu_rows.cpp
//   many rows of each weighting         panels of each mix into torch's product     mixed_linear_cpu_product.cpp
//   fewer                               blocks of the mixes into an own product     mixed_linear_cpu_fused.cpp
//   batch_invariant                     each row by its mix, in own fixed blocks    rows, fused
//
// The gradients of the deltas and coefficients are in mixed_linear_cpu_grad.cpp.
#include <algorithm>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Of 2500 random shapes up to 150 x 150, torch's product of few rows breaks the error budget on 4. Own blocks, of an
// earlier kind, took about its time up to here (K = 2, all weightings different, N = D = 2048, two Zen 3 cores: 25 ms
// for 64 rows, torch's product 26 for 65).
constexpr int64_t kTorchRows = 65;

// Products by tiles of bfloat16 that a stream takes.
int64_t products_of(Dtype dtype) { return dtype == Dtype::bf16 ? 1 : 2; }

// The product with the mix of each segment, or for all rows with each stream for itself.
Product product_of(const MixedLinearArgs& args, const Plan& plan, const Mixes& mixes, const Array& a, bool transposed,
                   bool mixed) {
  Product product{args, plan, a, transposed, Way::torch, {}, {}, 1, nullptr, {}};
  if (mixed) {
    product.segments = plan.segments;
    for (size_t g = 0; g < plan.segments.size(); g++) product.terms.push_back({mixes.of_segment(g), -1});
    return product;
  }
  static const float one = 1.0f;
  const Mix& any = mixes.any();
  product.segments = {{0, args.M, 0}};
  if (any.base || any.count == 0) product.terms.push_back({{any.base, 0, nullptr, nullptr}, -1});
  for (int64_t i = 0; i < any.count; i++) product.terms.push_back({{false, 1, any.copies + i, &one}, any.copies[i]});
  product.terms_each = static_cast<int64_t>(product.terms.size());
  return product;
}

// Runs the product into y [M, columns] of any dtype, the bias terms added.
void run_into(Product& product, const Bias& bias, void* y, Dtype y_dtype) {
  const bool in_place = y_dtype == Dtype::f32 && product.plan.order.empty();
  const bool has_bias = !bias.bias.empty() || !bias.bias_deltas.empty();
  if (in_place) product.out = static_cast<float*>(y);
  if (!in_place || has_bias) {
    product.finish = [&, in_place, has_bias](const Tile& tile) {
      const int64_t size = tile.j1 - tile.j0, K = product.args.weights.K;
      parallel(tile.m1 - tile.m0, size, [&](int64_t begin, int64_t end) {
        std::vector<float> added(size);
        const float* added_for = nullptr;
        for (int64_t m = begin; m < end; m++) {
          const int64_t row = product.plan.row(tile.m0 + m);
          const float* c = product.args.coefficients(row);
          float* results = tile.data + m * tile.step;
          if (has_bias && c != added_for) bias.mix(c, K, tile.j0, tile.j1, added.data());
          added_for = c;
          for (int64_t j = 0; has_bias && j < size; j++) results[j] += added[j];
          if (!in_place) kernels_in_use().narrow(results, size, y, y_dtype, row * product.columns() + tile.j0);
        }
      });
    };
  }
  run_product(product);
}

}  // namespace

const Kernels& kernels_in_use() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::portable:
      return kernels_portable;
    case Isa::avx2:
      return kernels_avx2;
    case Isa::avx512:
      return kernels_avx512;
    case Isa::avx512_bf16:
    case Isa::amx_bf16:
      return kernels_avx512_bf16;
  }
#endif
  return kernels_portable;
}

void Bias::mix(const float* c, int64_t K, int64_t n0, int64_t n1, float* out) const {
  for (int64_t n = n0; n < n1; n++) {
    float sum = bias.empty() ? 0.0f : bias[n];
    for (int64_t k = 0; !bias_deltas.empty() && k < K; k++) sum += c[k] * bias_deltas[n * K + k];
    out[n - n0] = sum;
  }
}

void mixed_linear_cpu_fwd(const Tensor& x, const std::optional<Tensor>& base, const Tensor& deltas, const Tensor& c,
                          const std::optional<Tensor>& row_map, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& bias_deltas, bool batch_invariant, bool exact_delta,
                          const Tensor& y) {
  const MixedLinearArgs args(base, deltas, c, row_map, rows_of(x));
  const int64_t M = args.M, N = args.weights.N, K = args.weights.K;
  if (M == 0 || N == 0) return;
  const Bias biases{to_floats(bias, "bias", N), to_floats(bias_deltas, "bias_deltas", N * K)};
  const Array values = array_of(x, "x");
  Plan plan = plan_rows(args.row_map, M, args.S);
  const Mixes mixes(plan, args.c, K, args.weights.base != nullptr);
  const int64_t segments = static_cast<int64_t>(plan.segments.size());
  const Mix& any = mixes.any();
  const int64_t num_streams = any.count + any.base;
  const TileKernels* tiles = values.dtype == Dtype::bf16 && !batch_invariant ? tile_kernels_in_use() : nullptr;
  const int64_t num_products =
      any.count * products_of(args.weights.deltas_dtype) + any.base * products_of(args.weights.base_dtype);
  const int64_t num_parts = tile_parts(args.weights, exact_delta);
  if (tiles && tile_mixes_are_cheaper(M, segments, num_streams, num_parts, num_products)) {
    Product product = product_of(args, plan, mixes, values, false, true);
    product.way = Way::tiles;
    product.is_exact = exact_delta;
    return run_into(product, biases, y.mutable_data_ptr(), values.dtype);
  }
  if (tiles && tiles_are_cheaper(M, segments, num_streams, num_products)) {
    return run_tiles(*tiles, args, mixes, values, biases, y.mutable_data_ptr());
  }
  const bool streams = streams_are_cheaper(M, segments, num_streams, true);
  if (batch_invariant || streams) {
    if (!batch_invariant) plan.order.clear();
    run_rows(args, plan, mixes, batch_invariant, values, biases, y.mutable_data_ptr(), values.dtype);
  } else {
    Product product = product_of(args, plan, mixes, values, false, true);
    if (forward_is_fused(M, segments)) product.way = Way::fused;
    run_into(product, biases, y.mutable_data_ptr(), values.dtype);
  }
}

Tensor mixed_linear_cpu_backward_x(const Tensor& dy, const std::optional<Tensor>& base, const Tensor& deltas,
                                   const Tensor& c, const Tensor& row_map, bool batch_invariant,
                                   bool exact_delta) {
  const MixedLinearArgs args(base, deltas, c, row_map);
  const int64_t M = args.M, D = args.weights.D;
  const Tensor rows = contiguous_rows(dy, "dy", M, args.weights.N);
  Tensor dx = empty_tensor({M, D}, rows.scalar_type());
  if (M == 0 || D == 0) return dx;
  const Array values = array_of(rows, "dy");
  Plan plan = plan_rows(args.row_map, M, args.S);
  const Mixes mixes(plan, args.c, args.weights.K, args.weights.base != nullptr);
  const int64_t segments = static_cast<int64_t>(plan.segments.size());
  const int64_t num_streams = mixes.any().count + mixes.any().base;
  const bool tiles = values.dtype == Dtype::bf16 && !batch_invariant && tile_products_in_use() &&
                     tile_mixes_are_cheaper(M, segments, num_streams, tile_parts(args.weights, exact_delta), 0);
  const bool mixed = batch_invariant || tiles || !streams_are_cheaper(M, segments, num_streams, false);
  if (!mixed) plan.order.clear();
  Product product = product_of(args, plan, mixes, values, true, mixed);
  if (batch_invariant || M < kTorchRows || (mixed && backward_x_is_fused(M, segments))) product.way = Way::fused;
  if (tiles) product.way = Way::tiles;
  product.is_exact = exact_delta;
  run_into(product, Bias(), dx.mutable_data_ptr(), values.dtype);
  return dx;
}

}  // namespace clp
