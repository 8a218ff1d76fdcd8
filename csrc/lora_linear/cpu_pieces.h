// Numbers as bf16 pieces, and pieces as tiles (common/amx.h): products of any float type on a unit that multiplies bf16.
//
// Maths    x = p0 + p1 + p2, pieces of 8 significant bits each, cut off from the top: float32 has 24, float16 11, so that
//          three pieces or two are all of x, and bf16 is its own only one. What a piece has below 2^-126 is lost.
//          Inf and NaN are their own first piece, the others are 0.
// Forms    16 lanes (rows of one operand, columns of the other) x 32 k, as pairs of neighbouring k. By lanes: a row of the
//          tile holds the 16 pairs of a lane. By pairs: a row holds one pair of all lanes. A product takes one of each.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/amx.h"
#include "common/lanes.h"
#include "common/transpose.h"

namespace omnimamba {
namespace {

#if defined(OM_AMX)

template <class T>
constexpr int kPieces = std::is_same_v<T, bf16>  ? 1
                        : std::is_same_v<T, f16> ? 2
                                                 : 3;

// Each piece in the upper half of its lane, the lower half 0.
template <int P>
OM_INLINE void split(vf x, vu* piece) {
  const vu bits = (vu)x;
  piece[0] = bits & 0xffff0000u;
  if constexpr (P > 1) {
    const vi finite = (vi)((bits & 0x7f800000u) != 0x7f800000u);
    piece[0] |= (vu)(x != x) & 0x00400000u;
    vf rest = select(finite, x - (vf)piece[0], vf{});
    for (int i = 1; i < P; i++) {
      piece[i] = (vu)rest & 0xffff0000u;
      rest -= (vf)piece[i];
    }
  }
}

// The pairs of n <= 32 neighbouring values, a vector a piece; zeros beyond.
template <class T>
OM_INLINE void pairs_of(const T* from, int n, vu* pairs) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __mmask32 first = n < kTileDepth ? (1u << n) - 1 : ~0u;
    pairs[0] = (vu)_mm512_maskz_loadu_epi16(first, from);
  } else {
    vu lower[kPieces<T>], upper[kPieces<T>];
    split<kPieces<T>>(load_some(from, std::min(n, W)), lower);
    split<kPieces<T>>(n > W ? load_some(from + W, n - W) : vf{}, upper);
    for (int i = 0; i < kPieces<T>; i++) {
      const __m256i a = _mm512_cvtepi32_epi16((__m512i)(lower[i] >> 16));
      const __m256i b = _mm512_cvtepi32_epi16((__m512i)(upper[i] >> 16));
      pairs[i] = (vu)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    }
  }
}

OM_INLINE void transpose_pairs(vu (&tile)[W]) {
  vf rows[W];
  std::memcpy(rows, tile, sizeof rows);
  transpose(rows);
  std::memcpy(tile, rows, sizeof rows);
}

// A matrix operand seen from one side: lane i and element k at from[i * lane_step + k * k_step].
template <class T>
struct Operand {
  const T* from;
  int64_t lane_step, k_step, lanes, k;
};

// 16 rows of 32 bf16 as they are, or as pairs.
template <bool ByPairs>
OM_INLINE void take_whole_tile(const bf16* from, int64_t step, char* to) {
  vf row[W];
#pragma GCC unroll 16
  for (int i = 0; i < kTileLanes; i++) std::memcpy(&row[i], from + i * step, sizeof row[i]);
  if constexpr (ByPairs) transpose(row);
#pragma GCC unroll 16
  for (int i = 0; i < kTileLanes; i++) std::memcpy(to + i * 64, &row[i], sizeof row[i]);
}

// tile[piece] of lanes from `lane` and k from `begin`, by lanes or by pairs; zeros beyond the operand.
template <bool ByPairs, class T>
OM_INLINE void take_tile(const Operand<T>& x, int64_t lane, int64_t begin, vu (*tile)[W]) {
  constexpr int P = kPieces<T>;
  const auto lanes = static_cast<int>(std::clamp<int64_t>(x.lanes - lane, 0, kTileLanes));
  const auto n = static_cast<int>(std::min<int64_t>(x.k - begin, kTileDepth));
  const T* from = x.from + lane * x.lane_step + begin * x.k_step;
  const bool across = x.k_step != 1 && x.lane_step == 1;
  for (int i = 0; i < kTileLanes; i++) {
    vu row[P] = {};
    if (across) {  // row i of the tile is pair i of all lanes
      vu odd[P] = {};
      if (lanes && 2 * i < n) split<P>(load_some(from + 2 * i * x.k_step, lanes), row);
      if (lanes && 2 * i + 1 < n) split<P>(load_some(from + (2 * i + 1) * x.k_step, lanes), odd);
      for (int j = 0; j < P; j++) row[j] = row[j] >> 16 | odd[j];
    } else if (i < lanes && x.k_step == 1) {
      pairs_of(from + i * x.lane_step, n, row);
    } else if (i < lanes) {
      T values[kTileDepth] = {};
      for (int k = 0; k < n; k++) values[k] = from[i * x.lane_step + k * x.k_step];
      pairs_of(values, n, row);
    }
    for (int j = 0; j < P; j++) tile[j][i] = row[j];
  }
  if (across != ByPairs)
    for (int j = 0; j < P; j++) transpose_pairs(tile[j]);
}

#endif

}  // namespace
}  // namespace omnimamba
