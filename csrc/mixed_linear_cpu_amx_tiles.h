// Intel AMX's tiles: their sizes and instructions.
//
// A tile is 16 rows of 64 bytes. One instruction multiplies a tile of 16 rows by 32 terms (as rows lie in memory) and a
// tile of 16 pairs of terms by 16 columns and adds to a tile of float32 sums, 16 rows by 16 columns. Products are exact,
// denormals count as zero.
//
// Included inside the namespace of the kernels.

constexpr int64_t kTile = 16;                    // rows of a tile
constexpr int64_t kTerms = 32;                   // terms of a tile
constexpr int64_t kTileSize = kTile * kTerms;    // bfloat16s of a tile

// The compiler's own functions for tiles do not tell it that they read memory, and take numbers of tiles only as text.
#define CLP_TILE_LOAD(tile, from, step) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(step)) : "memory")
#define CLP_TILE_STORE(tile, to, step) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(step)) : "memory")
#define CLP_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define CLP_TILE_MULTIPLY(sum, rows, columns) \
  __asm__ volatile("tdpbf16ps %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sum : : :)

// All eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void configure() {
  const TileConfig config;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static void release() { __asm__ volatile("tilerelease" : : :); }
