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

// Rows from which torch's products take less time than own tiles. Base alone, 2048 x 2048, one Xeon core, ms of torch's
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

TileTerm term_of(const Tensor& weight, const char* name, int64_t length, const Bf16* rows, const Bf16* rest,
                 int parts) {
  return {weight.const_data_ptr(), dtype_of(weight, name), length, rows, rest, parts};
}

// Of `rows` rows of `length` as tiles.
int64_t packed_floats(int64_t rows, int64_t length) { return ceil_div(rows * tile_terms(length), 2); }

// How many rows one pass over the weights takes: passes of about equal size, of pairs of tiles.
int64_t rows_of_pass(const TileKernels& kernels, int64_t M, int64_t D) {
  const int64_t pair = 2 * kernels.tile_rows, pairs = ceil_div(M, pair);
  const int64_t most = std::max<int64_t>(kPassBytes / (2 * std::max<int64_t>(tile_terms(D), 1)) / pair, 1);
  return ceil_div(pairs, ceil_div(pairs, most)) * pair;
}

// One pass's rows, packed, and the gated ranks in two parts.
class Passes {
 public:
  Passes(const TileKernels& kernels, const LowRankArgs& args, int64_t rows)
      : kernels_(kernels), args_(args), packed_x_(packed_floats(rows, args.D)), gated_(rows * args.R),
        halves_(rows * args.R), upper_(packed_floats(rows, args.R)), rest_(packed_floats(rows, args.R)),
        scratch_(tile_floats(kernels, rows, std::max(tile_terms(args.D) * 3 / 2, tile_terms(args.R)))) {}

  const Bf16* x() const { return as_halves(packed_x_); }
  const Bf16* upper() const { return as_halves(upper_); }
  const Bf16* rest() const { return as_halves(rest_); }

  // shrunk = x @ down^T of rows [m, m + rows), by all bits of float32 adapters: their own gradients are made of it.
  void shrink(int64_t m, int64_t rows, float* shrunk) {
    pack(static_cast<const Bf16*>(args_.x.const_data_ptr()) + m * args_.D, rows, args_.D, packed_x_);
    const TileTerm term = term_of(args_.down, "down", args_.D, x(), nullptr, 3);
    sum(&term, 1, args_.R, rows, nullptr, shrunk, Dtype::f32);
  }

  // The same rows' ranks under their gates.
  const float* gate(const Gates& gates, int64_t m, int64_t rows, const float* shrunk) {
    for (int64_t i = 0; i < rows; i++) {
      const float* gate = gates.of_row(m + i);
      for (int64_t r = 0; r < args_.R; r++) gated_.get()[i * args_.R + r] = shrunk[i * args_.R + r] * gate[r];
    }
    return gated_.get();
  }

  // out = the sum of the terms, which read upper(), rest() and x().
  void expand(const std::vector<TileTerm>& terms, int64_t rows, const float* bias, Bf16* out) {
    const int64_t size = rows * args_.R;
    Bf16* const parts = as_halves(halves_);
    split(gated_.get(), size, parts, parts + size);
    pack(parts, rows, args_.R, upper_);
    pack(parts + size, rows, args_.R, rest_);
    sum(terms.data(), static_cast<int64_t>(terms.size()), args_.N, rows, bias, out, Dtype::bf16);
  }

 private:
  static Bf16* as_halves(const Scratch& scratch) { return reinterpret_cast<Bf16*>(scratch.get()); }

  void pack(const Bf16* from, int64_t rows, int64_t length, const Scratch& to) {
    parallel(ceil_div(rows, kernels_.tile_rows), kernels_.tile_rows * length, [&](int64_t begin, int64_t end) {
      kernels_.pack(from, rows, length, begin, end, as_halves(to));
    });
  }

  void sum(const TileTerm* terms, int64_t num_terms, int64_t N, int64_t rows, const float* bias, void* out,
           Dtype dtype) {
    const int64_t tiles = ceil_div(rows, kernels_.tile_rows);
    const TileSums job{terms, num_terms, N, rows, tiles * kernels_.tile_rows, bias, out, dtype};
    // A tile of rows takes little longer than one: bytes of weights count.
    parallel(ceil_div(N, kernels_.outputs), kernels_.outputs * (args_.D + args_.R) * tiles,
             [&](int64_t begin, int64_t end) { kernels_.sums(job, begin, end, scratch_.get()); });
  }

  const TileKernels& kernels_;
  const LowRankArgs& args_;
  const Scratch packed_x_, gated_, halves_, upper_, rest_;
  const ThreadScratch scratch_;
};

bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

Tensor transposed(Tensor weight) { return torch::stable::transpose(weight, 0, 1); }

}  // namespace

void run_low_rank_tiles(const TileKernels& kernels, const LowRankArgs& args, const Gates& gates, Tensor& y,
                        float* shrink) {
  const int64_t M = args.M, N = args.N, R = args.R;
  if (M == 0) return;
  // torch's product adds to a y that holds the low-rank term alone: rounded to bfloat16 that keeps its own eight bits,
  // beside a bias it would not.
  const bool base_by_torch = M >= kTorchRows && args.base && !args.bias && is_bfloat16(*args.base);
  const bool expand_by_torch = base_by_torch && is_bfloat16(args.up);
  const int64_t pass_rows = rows_of_pass(kernels, M, args.D);
  Passes passes(kernels, args, pass_rows);
  const std::vector<float> bias = args.bias ? to_floats(*args.bias, "bias", N) : std::vector<float>();
  std::vector<TileTerm> terms{term_of(args.up, "up", R, passes.upper(), passes.rest(), 2)};
  if (args.base && !base_by_torch) terms.push_back(term_of(*args.base, "base", args.D, passes.x(), nullptr, 2));
  const Tensor rounded = empty_tensor({expand_by_torch ? M : 0, R}, ScalarType::BFloat16);
  for (int64_t m = 0; m < M; m += pass_rows) {
    const int64_t rows = std::min(pass_rows, M - m);
    passes.shrink(m, rows, shrink + m * R);
    const float* const gated = passes.gate(gates, m, rows, shrink + m * R);
    if (expand_by_torch) {
      kernels_in_use().narrow(gated, rows * R, rounded.mutable_data_ptr(), Dtype::bf16, m * R);
    } else {
      passes.expand(terms, rows, bias.empty() ? nullptr : bias.data(),
                    static_cast<Bf16*>(y.mutable_data_ptr()) + m * N);
    }
  }
  const Tensor out = matrix_of(y, M, N);
  if (expand_by_torch) gemm(out, rounded, transposed(args.up), false);
  if (base_by_torch) gemm(out, matrix_of(args.x, M, args.D), transposed(*args.base), true);
}

}  // namespace clp
