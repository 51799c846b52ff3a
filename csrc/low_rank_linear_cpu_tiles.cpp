// low_rank_linear of bfloat16 rows on a processor that multiplies tiles: base and expand are summed in float32 and
// rounded once.
#include "mixed_linear_cpu_tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "low_rank_linear_cpu_ops.h"

namespace clp {

namespace {

using torch::headeronly::ScalarType;

// Bytes of x of one pass over the weights: they stay in the second-level cache.
constexpr int64_t kPassBytes = 1 << 20;

// Rows from which torch's product takes less time than own tiles. Base alone, 2048 x 2048, one Xeon core, ms of torch's
// product, of its addition to y and of own tiles: 64 rows 2.2 2.3 2.0; 256 rows 3.9 4.2 4.0; 512 rows 6.1 6.9 7.7; 1024
// rows 11.7 12.8 15.1.
constexpr int64_t kTorchRows = 384;

// The gated ranks as two bfloat16s each, whose sum has 16 bits of them: the upper half of a float32 and the rest.
void split(const float* values, int64_t count, Bf16* upper, Bf16* rest) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    upper[i].bits = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    float high;
    std::memcpy(&high, &bits, sizeof high);
    // Of an infinity nothing is left.
    const float left = std::isfinite(high) ? values[i] - high : 0.0f;
    std::memcpy(&bits, &left, sizeof bits);
    rest[i].bits = static_cast<uint16_t>(bits >> 16);
  }
}

TileTerm term_of(const Tensor& weight, const char* name, int64_t length, const Bf16* rows, int parts) {
  return {weight.const_data_ptr(), dtype_of(weight, name), length, rows, parts};
}

// Of `rows` rows of `length` as tiles.
int64_t packed_floats(int64_t rows, int64_t length) { return ceil_div(rows * tile_terms(length), 2); }

}  // namespace

void run_low_rank_tiles(const TileKernels& kernels, const LowRankArgs& args, const Gates& gates, Tensor& y,
                        float* shrink) {
  const int64_t M = args.M, D = args.D, N = args.N, R = args.R;
  if (M == 0) return;
  // torch's product adds to a y that holds the low-rank term alone: rounded to bfloat16 that keeps its own eight bits,
  // beside a bias it would not.
  const bool by_torch = M >= kTorchRows && args.base && !args.bias && args.base->scalar_type() == ScalarType::BFloat16;
  const int64_t pair = 2 * kernels.tile_rows, pairs = ceil_div(M, pair);
  const int64_t most = std::max<int64_t>(kPassBytes / (2 * std::max<int64_t>(tile_terms(D), 1)) / pair, 1);
  const int64_t pass_rows = ceil_div(pairs, ceil_div(pairs, most)) * pair;
  const Scratch packed_x(packed_floats(pass_rows, D)), gated(pass_rows * R), halves(pass_rows * R);
  const Scratch packed_upper(packed_floats(pass_rows, R)), packed_rest(packed_floats(pass_rows, R));
  const int64_t terms = std::max(tile_terms(D) * 3 / 2, tile_terms(R));
  const ThreadScratch scratch(tile_floats(kernels, pass_rows, terms));
  const std::vector<float> bias = args.bias ? to_floats(*args.bias, "bias", N) : std::vector<float>();
  Bf16 *const x = reinterpret_cast<Bf16*>(packed_x.get()), *const upper = reinterpret_cast<Bf16*>(packed_upper.get());
  Bf16 *const rest = reinterpret_cast<Bf16*>(packed_rest.get()), *const parts = reinterpret_cast<Bf16*>(halves.get());
  const auto pack = [&](const Bf16* from, int64_t rows, int64_t length, Bf16* to) {
    parallel(ceil_div(rows, kernels.tile_rows), kernels.tile_rows * length,
             [&](int64_t begin, int64_t end) { kernels.pack(from, rows, length, begin, end, to); });
  };
  const auto sum = [&](const TileSums& job, int64_t length) {
    const int64_t work = kernels.outputs * length * job.padded_rows / kernels.tile_rows;
    parallel(ceil_div(job.N, kernels.outputs), work,
             [&](int64_t begin, int64_t end) { kernels.sums(job, begin, end, scratch.get()); });
  };
  // All bits of float32 adapters in the shrink: the adapters' own gradients are made of it.
  const TileTerm shrink_term = term_of(args.down, "down", D, x, 3);
  std::vector<TileTerm> out_terms{term_of(args.up, "up", R, upper, 2), term_of(args.up, "up", R, rest, 1)};
  if (args.base && !by_torch) out_terms.push_back(term_of(*args.base, "base", D, x, 2));
  for (int64_t m = 0; m < M; m += pass_rows) {
    const int64_t rows = std::min(pass_rows, M - m), padded = ceil_div(rows, kernels.tile_rows) * kernels.tile_rows;
    float* const shrunk = shrink + m * R;
    pack(static_cast<const Bf16*>(args.x.const_data_ptr()) + m * D, rows, D, x);
    sum({&shrink_term, 1, R, rows, padded, nullptr, shrunk, Dtype::f32}, D);
    for (int64_t i = 0; i < rows; i++) {
      const float* gate = gates.of_row(m + i);
      for (int64_t r = 0; r < R; r++) gated.get()[i * R + r] = shrunk[i * R + r] * gate[r];
    }
    split(gated.get(), rows * R, parts, parts + rows * R);
    pack(parts, rows, R, upper);
    pack(parts + rows * R, rows, R, rest);
    Bf16* const out = static_cast<Bf16*>(y.mutable_data_ptr()) + m * N;
    const float* const first = bias.empty() ? nullptr : bias.data();
    sum({out_terms.data(), static_cast<int64_t>(out_terms.size()), N, rows, padded, first, out, Dtype::bf16}, D + R);
  }
  if (by_torch) {
    Tensor base = *args.base;
    gemm(matrix_of(y, M, N), matrix_of(args.x, M, D), torch::stable::transpose(base, 0, 1), true);
  }
}

}  // namespace clp
