// A register tile of a matrix product in float32: up to kTileRows rows x kTileVectors vectors of accumulators, one pass
// over k. The row operand is broadcast, the column operand is loaded as vectors; neither needs a packed copy of its own,
// only a constant step from one k to the next. The shape keeps the multipliers of a core busy from registers alone:
// 12 x 2 accumulators of 32 registers (AVX-512), 6 x 4 of 32 (NEON), 6 x 2 of 16 (SSE, AVX2). AVX-512 takes the narrow
// one so that 128 rows of column operand are 16 KB: two such panels share the first cache level.
#pragma once
#include <type_traits>

#include "simd.h"

namespace omnimamba {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * W;

template <int Rows = kTileRows>
struct Tile {
  vf acc[Rows][kTileVectors] = {};
};

// tile[r][c] += sum over i < k of rows[r * RowStep + i * row_k] * columns[i * column_k + c].
template <int RowStep, int Rows>
OM_INLINE void tile_add(Tile<Rows>& tile, int k, const float* rows, int64_t row_k, const float* columns,
                        int64_t column_k) {
  for (int i = 0; i < k; i++, rows += row_k, columns += column_k) {
    vf column[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) column[v] = load(columns + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      vf row = splat(rows[r * RowStep]);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) tile.acc[r][v] += row * column[v];
    }
  }
}

// body(r, v, accumulator) for every vector of the tile, unrolled.
template <int Rows, class Body>
OM_INLINE void tile_each(Tile<Rows>& tile, Body&& body) {
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) body(r, v, tile.acc[r][v]);
}

// Not inlined: what the caller keeps in vector registers would push the tile out of them.
template <int Rows, class Body>
__attribute__((noinline)) void one_tile(Body& body, int at) {
  body(std::integral_constant<int, Rows>{}, at);
}

// body(height, first row) for `rows` rows from the first to the last: whole tiles, then one of a third, two thirds or all
// of kTileRows, whichever is enough. height is a constant: Tile<height>.
template <class Body>
OM_INLINE void each_tile(int rows, Body&& body) {
  constexpr int third = kTileRows / 3;
  int at = 0;
  for (; rows - at > 2 * third; at += kTileRows) one_tile<kTileRows>(body, at);
  if (rows - at > third) {
    one_tile<2 * third>(body, at);
  } else if (rows > at) {
    one_tile<third>(body, at);
  }
}

}  // namespace omnimamba
