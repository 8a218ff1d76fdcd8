// A register tile of a matrix product in float32: kTileRows x (kTileVectors vectors) accumulators, one pass over k.
// The row operand is broadcast, the column operand is loaded as vectors; neither needs a packed copy of its own, only a
// constant step from one k to the next. The shape keeps the multipliers of a core busy from registers alone: 6 x 4
// accumulators of 32 registers (AVX-512, NEON), 6 x 2 of 16 (SSE, AVX2).
#pragma once
#include "simd.h"

namespace omnimamba {

constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileColumns = kTileVectors * W;

struct Tile {
  vf acc[kTileRows][kTileVectors] = {};
};

// tile[r][c] += sum over i < k of rows[r * RowStep + i * row_k] * columns[i * column_k + c].
template <int RowStep>
OM_INLINE void tile_add(Tile& tile, int k, const float* rows, int64_t row_k, const float* columns, int64_t column_k) {
  for (int i = 0; i < k; i++, rows += row_k, columns += column_k) {
    vf column[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) column[v] = load(columns + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
      vf row = splat(rows[r * RowStep]);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) tile.acc[r][v] += row * column[v];
    }
  }
}

// body(r, v, accumulator) for every vector of the tile, unrolled.
template <class Body>
OM_INLINE void tile_each(Tile& tile, Body&& body) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) body(r, v, tile.acc[r][v]);
}

}  // namespace omnimamba
