// Transposes: W x W values in registers, and from that a matrix of any size in memory; W x K values for a few columns K.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace omnimamba {

// Lane i takes lane From::at(i) of a, from W on of b.
template <class From, int... I>
OM_INLINE vf shuffle(vf a, vf b, From, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From::at(I)...);
#else
  return __builtin_shuffle(a, b, vi{From::at(I)...});
#endif
}
template <class From>
OM_INLINE vf shuffle(vf a, vf b, From from) {
  return shuffle(a, b, from, std::make_integer_sequence<int, W>());
}

// a and b lane by lane, a first: their lower halves (First = 0) or their upper ones (First = W / 2).
template <int First>
struct Interleaved {
  static constexpr int at(int i) { return First + i / 2 + i % 2 * W; }
};

// rows[c][r] = rows[r][c]: each round interleaves row i with row i + W / 2, and log2 W rounds bring every lane home.
OM_INLINE void transpose(vf (&rows)[W]) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; i++) {
      mixed[2 * i] = shuffle(rows[i], rows[i + W / 2], Interleaved<0>{});
      mixed[2 * i + 1] = shuffle(rows[i], rows[i + W / 2], Interleaved<W / 2>{});
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

// W rows of K values one after another, K <= 4, as their columns: split makes v[k][i] of what v holds in order, element
// i K + k; join puts it back in order.
template <int K>
struct Columns;

template <>
struct Columns<1> {
  static OM_INLINE void split(vf*) {}
  static OM_INLINE void join(vf*) {}
};

template <>
struct Columns<2> {
  template <int K>
  struct Every {
    static constexpr int at(int i) { return 2 * i + K; }
  };
  static OM_INLINE void split(vf& a, vf& b) {
    const vf even = shuffle(a, b, Every<0>{});
    b = shuffle(a, b, Every<1>{});
    a = even;
  }
  static OM_INLINE void join(vf& a, vf& b) {
    const vf lower = shuffle(a, b, Interleaved<0>{});
    b = shuffle(a, b, Interleaved<W / 2>{});
    a = lower;
  }
  static OM_INLINE void split(vf* v) { split(v[0], v[1]); }
  static OM_INLINE void join(vf* v) { join(v[0], v[1]); }
};

template <>
struct Columns<3> {
  // Element e = 3 i + K lies in vector e / W: first from two vectors, then the third's lanes over these.
  template <int K, bool Third>
  struct Column {
    static constexpr int at(int i) {
      const int e = 3 * i + K;
      return Third ? (e < 2 * W ? i : e - W) : (e < 2 * W ? e : 0);
    }
  };
  template <int Vector, bool Third>
  struct Ordered {
    static constexpr int at(int i) {
      const int e = Vector * W + i, column = e % 3;
      return Third ? (column == 2 ? W + e / 3 : i) : (column == 2 ? 0 : column * W + e / 3);
    }
  };
  template <int K>
  static OM_INLINE vf column(const vf* v) {
    return shuffle(shuffle(v[0], v[1], Column<K, false>{}), v[2], Column<K, true>{});
  }
  template <int Vector>
  static OM_INLINE vf ordered(const vf* v) {
    return shuffle(shuffle(v[0], v[1], Ordered<Vector, false>{}), v[2], Ordered<Vector, true>{});
  }
  static OM_INLINE void split(vf* v) {
    const vf a = column<0>(v), b = column<1>(v);
    v[2] = column<2>(v);
    v[0] = a, v[1] = b;
  }
  static OM_INLINE void join(vf* v) {
    const vf a = ordered<0>(v), b = ordered<1>(v);
    v[2] = ordered<2>(v);
    v[0] = a, v[1] = b;
  }
};

template <>
struct Columns<4> {
  static OM_INLINE void split(vf* v) {
    Columns<2>::split(v[0], v[1]);
    Columns<2>::split(v[2], v[3]);
    Columns<2>::split(v[0], v[2]);
    Columns<2>::split(v[1], v[3]);
  }
  static OM_INLINE void join(vf* v) {
    Columns<2>::join(v[1], v[3]);
    Columns<2>::join(v[0], v[2]);
    Columns<2>::join(v[2], v[3]);
    Columns<2>::join(v[0], v[1]);
  }
};

}  // namespace omnimamba
