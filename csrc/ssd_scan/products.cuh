// Matrix products of a warp in blocks of 16 x 16 (A) by 16 x 8 (B), the same for both kinds of operands:
//
//   bf16   one instruction a block. A number computed in float32 enters as one bf16, or as three whose sum it is.
//   float  tf32 instructions. Each number is the sum of two tf32, and the product leaves out only low x low: 2^-22.
//
// Elements lie as fragment::a16, b16 and c say. For tf32 that numbers k in another order, the same for A and B, so that an
// accumulator's lanes hold just what they need for it to become an A.
#pragma once
#include "../common/mma.cuh"

namespace omnimamba::ssd {

// Rows of WIDTH elements (a power of two, 16 or more) in shared memory. Eight neighbouring rows have their pieces of 16
// bytes in different banks: bf16 by exchanging the pieces of a row, float by a gap after it.
template <class T, int WIDTH>
struct Rows {
  static constexpr int EACH = 16 / static_cast<int>(sizeof(T)), PIECES = WIDTH / EACH;
  static constexpr int PITCH = sizeof(T) == 2 ? WIDTH : WIDTH + 8;
  T* base;

  // `column` is a multiple of 16 where `further` (less than 16) is not 0. Apart, because what is the same for all lanes
  // should not take a register for each place in an unrolled loop.
  OM_DEVICE T* at(int row, int column, int further = 0) const {
    if constexpr (sizeof(T) == 2) {
      constexpr int TOGETHER = PIECES < 8 ? 8 / PIECES : 1, MASK = (PIECES < 8 ? PIECES : 8) - 1;
      const int piece = column / EACH, turned = further / EACH ^ (row / TOGETHER & MASK);
      return base + row * WIDTH + (piece & ~MASK) * EACH + ((piece & MASK) ^ turned) * EACH + (column + further) % EACH;
    } else {
      return base + row * PITCH + column + further;
    }
  }
};

// 16 x 16 elements as they came from memory: element i of a lane is fragment::a16(lane, i).
template <class T>
struct Block;
template <>
struct Block<bf16> {
  uint32_t pair[4];
  OM_DEVICE float value(int i) const { return to_float(bf16{static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16)}); }
};
template <>
struct Block<float> {
  float values[8];
  OM_DEVICE float value(int i) const { return values[i]; }
};

// tile[row ...][column ...], rows along A's rows; or TURNED, rows along k.
template <bool TURNED, class T, int WIDTH>
OM_DEVICE Block<T> load_block(const Rows<T, WIDTH>& tile, int row, int column) {
  Block<T> out;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int near = lane % 8 + lane / 8 % 2 * 8, far = lane / 16 * 8;
    load_matrices<TURNED>(
        out.pair, TURNED ? tile.at(row + lane % 8 + far, column, lane / 8 % 2 * 8) : tile.at(row + near, column, far));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Place at = fragment::a16(lane, i);
      out.values[i] = TURNED ? *tile.at(row + at.column, column + at.row) : *tile.at(row + at.row, column + at.column);
    }
  }
  return out;
}

// A: TERMS numbers of bf16 (an exact Block has one), or two tf32.
template <class T, int TERMS>
struct Left {
  uint32_t pair[TERMS][4];

  OM_DEVICE Left() {}
  OM_DEVICE explicit Left(const Block<T>& block) {
#pragma unroll
    for (int i = 0; i < 4; i++) pair[0][i] = block.pair[i];
  }
  OM_DEVICE explicit Left(const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float low = v[i], high = v[i + 1];
#pragma unroll
      for (int term = 0; term < TERMS; term++) {
        const uint32_t both = pair[term][i / 2] = pack_two<T>(low, high);
        low -= to_float(T{static_cast<uint16_t>(both)});
        high -= to_float(T{static_cast<uint16_t>(both >> 16)});
      }
    }
  }
};
template <int TERMS>
struct Left<float, TERMS> {
  float high[8], low[8];

  OM_DEVICE Left() {}
  OM_DEVICE explicit Left(const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      high[i] = round_tf32(v[i]);
      low[i] = round_tf32(v[i] - high[i]);
    }
  }
  OM_DEVICE explicit Left(const Block<float>& block) : Left(block.values) {}
};

// B, 16 x 8: element i of a lane is fragment::b16(lane, i).
template <class T>
struct Right {
  uint32_t pair[2];
};
template <>
struct Right<float> {
  float high[4], low[4];
};

// Two neighbouring B: tile[column of B][k], or TURNED, tile[k][column of B].
template <bool TURNED, class T, int WIDTH>
OM_DEVICE void load_rights(Right<T> (&out)[2], const Rows<T, WIDTH>& tile, int k, int n) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int second = lane / 16 * 8, deep = lane / 8 % 2 * 8;
    uint32_t found[4];
    load_matrices<TURNED>(found,
                          TURNED ? tile.at(k + deep + lane % 8, n, second) : tile.at(n + second + lane % 8, k, deep));
#pragma unroll
    for (int i = 0; i < 4; i++) out[i / 2].pair[i % 2] = found[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Place at = fragment::b16(lane, i % 4);
      const int row = k + at.row, column = n + i / 4 * 8 + at.column;
      const float v = TURNED ? *tile.at(row, column) : *tile.at(column, row);
      out[i / 4].high[i % 4] = round_tf32(v);
      out[i / 4].low[i % 4] = round_tf32(v - out[i / 4].high[i % 4]);
    }
  }
}

// c += A B.
template <class T, int TERMS>
OM_DEVICE void multiply(float (&c)[4], const Left<T, TERMS>& a, const Right<T>& b) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int term = TERMS - 1; term >= 0; term--) mma<T>(c, a.pair[term], b.pair);
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      auto lefts = [half](const float (&v)[8], float (&out)[4]) {
        out[0] = v[4 * half], out[1] = v[4 * half + 2], out[2] = v[4 * half + 1], out[3] = v[4 * half + 3];
      };
      float high[4], low[4];
      lefts(a.high, high);
      lefts(a.low, low);
      const float right_high[2] = {b.high[2 * half], b.high[2 * half + 1]};
      const float right_low[2] = {b.low[2 * half], b.low[2 * half + 1]};
      mma_tf32(c, low, right_high);
      mma_tf32(c, high, right_low);
      mma_tf32(c, high, right_high);
    }
  }
}

// Two accumulators side by side as the values of an A.
OM_DEVICE void side_by_side(float (&out)[8], const float (&first)[4], const float (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = first[i], out[4 + i] = second[i];
}

// Two neighbours of a row of a tile; column is even.
template <class T, int WIDTH>
OM_DEVICE void put_pair(const Rows<T, WIDTH>& tile, int row, int column, float first, float second) {
  const float both[2] = {first, second};
  store_floats(tile.at(row, column), both);
}

}  // namespace omnimamba::ssd
