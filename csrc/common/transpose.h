// Transposes: W x W values in registers, and from that a matrix of any size in memory.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace omnimamba {

// a and b lane by lane, a first: their lower halves (From = 0) or their upper ones (From = W / 2).
template <int From, int... I>
OM_INLINE vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (From + I / 2 + I % 2 * W)...);
#else
  return __builtin_shuffle(a, b, vi{(From + I / 2 + I % 2 * W)...});
#endif
}

// rows[c][r] = rows[r][c]: each round interleaves row i with row i + W / 2, and log2 W rounds bring every lane home.
OM_INLINE void transpose(vf (&rows)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; i++) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + W / 2], lanes);
      mixed[2 * i + 1] = interleave<W / 2>(rows[i], rows[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = mixed[i];
  }
}

// out[c][r] = in[r][c].
inline void transpose(const float* in, int64_t in_row, int rows, int columns, float* out, int64_t out_row) {
  for (int r0 = 0; r0 < rows; r0 += W)
    for (int c0 = 0; c0 < columns; c0 += W) {
      const float* from = in + r0 * in_row + c0;
      float* to = out + c0 * out_row + r0;
      const int height = std::min(W, rows - r0), width = std::min(W, columns - c0);
      vf block[W];
      if (height == W && width == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) block[i] = load(from + i * in_row);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(to + i * out_row, block[i]);
      } else {
        for (int c = 0; c < width; c++)
          for (int r = 0; r < height; r++) to[c * out_row + r] = from[r * in_row + c];
      }
    }
}

}  // namespace omnimamba
