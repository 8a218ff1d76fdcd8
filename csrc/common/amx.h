// Matrix registers of x86 processors (Intel AMX): eight tiles of 16 rows of 64 bytes each, and a product of two of them.
//
// tile_multiply(c, a, b) adds to c[i][j], a float, a[i][2k] b[k][2j] + a[i][2k + 1] b[k][2j + 1] over 16 pairs k: a holds
// 16 rows of 32 bf16, b 16 rows of 16 pairs. Products are exact. Even and odd k are summed apart, in order, then added to
// each other and to c, each sum rounded to the nearest float32. A bf16 operand below 2^-126 counts as 0, as does a sum.
// One element of c depends on its row of a and its column of b alone.
//
// The system hands out the registers by process, on request (may_use_tiles() in isa.h). Their shape is a state of each
// thread.
#pragma once
#include "simd.h"
#if defined(__AVX512F__) && defined(__linux__) && !defined(OMNIMAMBA_NO_AMX)
#if __has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>))
#define OM_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif
#endif

namespace omnimamba {

constexpr int kTileBytes = 1024, kTileLanes = 16, kTilePairs = 16, kTileDepth = 2 * kTilePairs;

#if defined(OM_AMX)
struct TileShapes {
  uint8_t palette, start_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
alignas(64) inline constexpr TileShapes kWholeTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof kWholeTiles == 64);

// All eight tiles of this thread are 16 x 64 bytes within a scope.
class Tiles {
 public:
  OM_AMX Tiles() { _tile_loadconfig(&kWholeTiles); }
  OM_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tiles are named by number, as literals: compilers write them into the instruction. GCC's own tile_load does not say that
// it reads memory.
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, row_bytes)  \
  do {                                    \
    asm volatile("" ::: "memory");        \
    _tile_loadd(tile, (from), row_bytes); \
  } while (false)
#define tile_store(tile, to) _tile_stored(tile, (to), 64)
#define tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

}  // namespace omnimamba
