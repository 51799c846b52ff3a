// Between the drivers of products by tiles (mixed_linear_cpu_tiles.cpp, low_rank_linear_cpu_tiles.cpp) and their
// kernels (mixed_linear_cpu_amx.cpp). Includes no standard header with inline functions, as mixed_linear_cpu.h.
#pragma once

#include "cpu_amx.h"
#include "mixed_linear_cpu.h"

namespace clp {

// Inputs of a row in whole tiles of 32.
inline int64_t tile_terms(int64_t D) { return (D + 31) / 32 * 32; }

// y[m, n] = sum over streams of coefficient * <x_m, stream_n>, and the bias terms: each stream's products by tiles, and
// weighted in float32 by the coefficients of the rows.
struct TilesJob {
  Weights weights;
  Mix streams;               // its c is not used
  int64_t rows, padded_rows; // of x, and in whole tiles
  const Bf16* x;             // packed
  const float* c;            // [K, padded_rows]
  const float* bias;         // [N] or null
  const float* bias_deltas;  // [N, K] or null
  Bf16* y;                   // [rows, N]
  int64_t together;          // copies that are made into tiles at once, where they are not read in place
};

// Rows by a weight [N, length] of its own.
struct TileTerm {
  const void* weight;
  Dtype dtype;
  int64_t length;
  const Bf16* rows;          // packed
  const Bf16* rest;          // packed; null, or what is left of float32 rows, for 16 bits of them
  int parts;                 // 2 or 3 bfloat16s for each weight of another dtype: 16 or 24 bits of it
};

// y[m, n] = sum over terms of <row m, weight row n>, and the bias.
struct TileSums {
  const TileTerm* terms;
  int64_t num_terms, N;
  int64_t rows, padded_rows; // and in whole tiles
  const float* bias;         // [N] or null
  void* y;                   // [rows, N]
  Dtype y_dtype;             // bf16 or f32
};

struct TileKernels {
  int64_t tile_rows;         // rows of x of a tile
  int64_t outputs;           // of one work item of `products`
  // Tiles [tile_begin, tile_end) of rows of x [rows, D]: [tiles, tile_rows * tile_terms(D)]
  void (*pack)(const Bf16* x, int64_t rows, int64_t D, int64_t tile_begin, int64_t tile_end, Bf16* out);
  // Outputs [outputs * block_begin, ..); `scratch` holds tiles_scratch(kernels, job) floats.
  void (*products)(const TilesJob& job, int64_t block_begin, int64_t block_end, float* scratch);
  // The same; `scratch` holds tile_floats(kernels, padded_rows, terms) floats, the terms of the longest weight, one and
  // a half times those of one in three parts.
  void (*sums)(const TileSums& job, int64_t block_begin, int64_t block_end, float* scratch);
};

// Floats of a block's sums, the products of one stream, and `terms` of weights in two parts.
inline int64_t tile_floats(const TileKernels& kernels, int64_t padded_rows, int64_t terms) {
  return kernels.outputs * (padded_rows + 32 + terms);
}

// Floats that one thread of `products` needs.
inline int64_t tiles_scratch(const TileKernels& kernels, const TilesJob& job) {
  return tile_floats(kernels, job.padded_rows, job.together * tile_terms(job.weights.D));
}

#ifdef CLP_AMX
extern const TileKernels tile_kernels_amx;
#endif

}  // namespace clp
