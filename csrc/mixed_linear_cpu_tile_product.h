// Between the drivers of products of many bfloat16 rows by tiles (mixed_linear_cpu_tile_product.cpp,
// mixed_linear_cpu_tile_gradient.cpp) and their kernels (mixed_linear_cpu_amx_product.cpp). Includes no standard header
// with inline functions, as mixed_linear_cpu.h.
//
// out [rows, columns] = left [rows, terms] right [terms, columns], both packed as tiles: of each tile of rows or columns
// those of all terms, zero past the last row, term and column.
#pragma once

#include "cpu_amx.h"
#include "mixed_linear_cpu.h"

namespace clp {

constexpr int64_t kMostParts = 3;

// A left matrix in memory: its rows, or, where `transposed`, its columns lie along `values`.
struct LeftTiles {
  const Bf16* values;
  int64_t step;              // from one row of memory to the next
  const int32_t* order;      // rows of memory in the order of work; null: as they are
  bool transposed;           // rows of memory are terms
  int64_t rows, terms;
  Bf16* out;
  int64_t out_step;          // from one tile of rows to the next
};

// Columns [j0, j1) and terms [i0, i1) of the base, of a mix of copies or (bfloat16 base, other deltas than float16) of
// their sum, each rounded to a bfloat16, or, but for the sum, split into two whose sum has 16 bits of it. Columns are
// outputs n and terms inputs d, or, where `transposed`, the other way round.
struct RightTiles {
  Weights weights;
  Mix mix;
  bool transposed;
  const int32_t* order;      // rows of a transposed base in the order of work; null: as they are
  int64_t j0, j1, i0, i1;
  int parts;
  Bf16* out;                 // the parts, `part_step` apart
  int64_t part_step;
};

// out = or += the sum of the products with each part of right.
struct TileProduct {
  const Bf16* left;
  int64_t left_step;         // from one tile of rows to the next
  const Bf16* right[kMostParts];
  int parts;
  int64_t right_tiles, term_tiles;
  bool add;
  float* out;                // in whole tiles
  int64_t out_step;
};

struct TileProductKernels {
  int64_t tile, terms;       // rows or columns, and terms, of a tile
  // Tiles of rows, of columns, of rows
  void (*pack_left)(const LeftTiles& job, int64_t tile_begin, int64_t tile_end);
  void (*pack_right)(const RightTiles& job, int64_t tile_begin, int64_t tile_end);
  void (*product)(const TileProduct& job, int64_t left_begin, int64_t left_end);
};

#ifdef CLP_AMX
extern const TileProductKernels tile_products_amx;
#endif

}  // namespace clp
