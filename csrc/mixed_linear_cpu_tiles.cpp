// bfloat16 rows on a processor that multiplies tiles: every stream read once for some hundred rows, one product for
// each.
#include "mixed_linear_cpu_tiles.h"

#include <algorithm>

#include "cpu_features.h"
#include "mixed_linear_cpu_ops.h"

namespace clp {

namespace {

// Bytes of x that one pass over the weights takes, at most: with the weights of a block they stay in the second-level
// cache.
constexpr int64_t kPassBytes = 1 << 20;

// Bytes of the weights of a block that are made into tiles at once, at most, but for one copy alone.
constexpr int64_t kTogetherBytes = 1 << 19;

}  // namespace

const TileKernels* tile_kernels_in_use() {
#ifdef CLP_AMX
  if (current_isa() == Isa::amx_bf16) return &tile_kernels_amx;
#endif
  return nullptr;
}

void run_tiles(const TileKernels& kernels, const MixedLinearArgs& args, const Mixes& mixes, const Array& x,
               const Bias& bias, void* y) {
  const Weights& w = args.weights;
  const int64_t M = args.M, terms = tile_terms(w.D), row_bytes = std::max<int64_t>(2 * terms, 1);
  // Passes of about equal size, of pairs of tiles: two are multiplied at once.
  const int64_t pair = 2 * kernels.tile_rows, pairs = ceil_div(M, pair);
  const int64_t passes = ceil_div(pairs, std::max<int64_t>(kPassBytes / row_bytes / pair, 1));
  const int64_t pass_rows = ceil_div(pairs, passes) * pair;
  TilesJob job{w, mixes.any(), 0, pass_rows, nullptr, nullptr, nullptr, nullptr, nullptr, 1};
  if (!bias.bias.empty()) job.bias = bias.bias.data();
  if (!bias.bias_deltas.empty()) job.bias_deltas = bias.bias_deltas.data();
  job.together = std::clamp<int64_t>(kTogetherBytes / (2 * row_bytes * kernels.outputs), 1,
                                     std::max<int64_t>(job.streams.count, 1));
  const Scratch packed(ceil_div(pass_rows * terms, 2));
  const ThreadScratch scratch(tiles_scratch(kernels, job));
  std::vector<float> c(w.K * pass_rows);
  Bf16* rows = reinterpret_cast<Bf16*>(packed.get());
  job.x = rows;
  job.c = c.data();
  for (int64_t m = 0; m < M; m += pass_rows) {
    job.rows = std::min(pass_rows, M - m);
    const int64_t tiles = ceil_div(job.rows, kernels.tile_rows);
    job.padded_rows = tiles * kernels.tile_rows;
    std::fill(c.begin(), c.end(), 0.0f);
    for (int64_t i = 0; i < job.rows; i++) {
      const float* of_row = args.coefficients(m + i);
      for (int64_t k = 0; k < w.K; k++) c[k * job.padded_rows + i] = of_row[k];
    }
    const Bf16* first = static_cast<const Bf16*>(x.data) + m * w.D;
    parallel(tiles, kernels.tile_rows * w.D, [&](int64_t begin, int64_t end) {
      kernels.pack(first, job.rows, w.D, begin, end, rows);
    });
    job.y = static_cast<Bf16*>(y) + m * w.N;
    // A tile of rows takes little longer than one: bytes of weights count.
    const int64_t work = kernels.outputs * w.D * (job.streams.count + 1) * tiles;
    parallel(ceil_div(w.N, kernels.outputs), work,
             [&](int64_t begin, int64_t end) { kernels.products(job, begin, end, scratch.get()); });
  }
}

}  // namespace clp
