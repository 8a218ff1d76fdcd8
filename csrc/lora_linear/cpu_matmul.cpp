#include <algorithm>

#include "common/check.h"
#include "common/isa.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/tile.h"
#include "common/transpose.h"
#include "lora_linear/cpu_matmul_amx.h"
#include "lora_linear/matmul.h"

namespace omnimamba {
namespace {

constexpr int AHEAD = 64;  // elements from one in use to the one prefetched

static_assert(kTileRows <= 12, "the workspace pads m by 12");
static_assert(kMatmulColumns % kTileColumns == 0, "a chunk is made of whole tiles");

// to[i][lane] = from[lane * lane_step + i] for `Width` lanes and W elements of k, in vectors.
template <int Width, class T>
OM_INLINE void transpose_block(const T* from, int64_t lane_step, float* to) {
  for (int first = 0; first < Width; first += W) {
    vf block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      const T* row = from + (first + i) * lane_step;
      __builtin_prefetch(row + AHEAD);  // rows far apart: the hardware does not foresee it
      block[i] = load(row);
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) store(to + i * Width + first, block[i]);
  }
}

// to[i][lane] = from[lane * lane_step + i * k_step] for `Width` lanes, of which the first `lanes` exist; zeros beyond.
template <int Width, class T>
void unpack(const T* from, int64_t lane_step, int64_t k_step, int64_t lanes, int64_t k, float* to) {
  if (lane_step == 1 && lanes == Width && Width % W == 0) {
    for (int64_t i = 0; i < k; i++)
      for (int c = 0; c < Width; c += W) store(to + i * Width + c, load(from + i * k_step + c));
    return;
  }
  if (lanes < Width) std::fill(to, to + k * Width, 0.0f);
  int64_t begin = 0;
  if constexpr (Width % W == 0) {
    if (k_step == 1 && lanes == Width)
      for (; begin + W <= k; begin += W) transpose_block<Width>(from + begin, lane_step, to + begin * Width);
  }
  for (from += begin * k_step, to += begin * Width; begin < k;
       begin += AHEAD, from += AHEAD * k_step, to += AHEAD * Width) {
    const int64_t count = std::min<int64_t>(AHEAD, k - begin);
    for (int64_t lane = 0; lane < lanes; lane++) {
      const T* row = from + lane * lane_step;
      float strip[AHEAD];
      int64_t i = 0;
      if (k_step == 1) {
        for (size_t byte = 0; byte < AHEAD * sizeof(T); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(row + AHEAD) + byte);
        for (; i + W <= count; i += W) store(strip + i, load(row + i));
      }
      for (; i < count; i++) strip[i] = to_float(row[i * k_step]);
      for (i = 0; i < count; i++) to[i * Width + lane] = strip[i];
    }
  }
}

struct Block {
  int64_t k;  // first element of this block of k
  int depth;  // how many
  float* a;   // panels of kTileRows rows, depth deep
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void unpack_a(const MatmulParams& p, const Block& block) {
  for_float_type(p.a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.threads, ceil_div(p.m, kTileRows), [&](int64_t panel, int) {
      const int64_t row = panel * kTileRows;
      unpack<kTileRows>(p.a.at<T>(row, block.k), p.a.stride[0], p.a.stride[1], std::min<int64_t>(kTileRows, p.m - row),
                        block.depth, block.a + row * block.depth);
    });
  });
}

void unpack_b(const MatmulParams& p, const Block& block, int64_t column, int64_t columns, float* to) {
  for_float_type(p.b.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t c = 0; c < columns; c += kTileColumns)
      unpack<kTileColumns>(p.b.at<T>(block.k, column + c), p.b.stride[1], p.b.stride[0],
                           std::min<int64_t>(kTileColumns, columns - c), block.depth, to + c * block.depth);
  });
}

// One tile of c at (row, column), from panels of a and b.
OM_INLINE void matmul_tile(const MatmulParams& p, const Block& block, int64_t row, int64_t column, const float* b) {
  Tile tile;
  tile_add<1>(tile, block.depth, block.a + row * block.depth, kTileRows, b, kTileColumns);
  const View& before = block.k > 0 ? p.c : p.start;
  const int64_t rows = p.m - row, columns = p.n - column;
  tile_each(tile, [&](int r, int v, vf sums) {
    const int64_t left = columns - v * W;
    if (r >= rows || left <= 0) return;
    const int n = static_cast<int>(std::min<int64_t>(W, left));
    if (before) sums += load_some(before.at<float>(row + r, column + v * W), n);
    store_some(p.c.at<float>(row + r, column + v * W), sums, n);
  });
}

// Rows [first, last) of panels against one chunk of columns.
void one_chunk(const MatmulParams& p, const Block& block, int64_t first, int64_t last, int64_t column, float* b) {
  const int64_t columns = std::min<int64_t>(kMatmulColumns, p.n - column);
  unpack_b(p, block, column, columns, b);
  for (int64_t panel = first; panel < last; panel++)
    for (int64_t c = 0; c < columns; c += kTileColumns)
      matmul_tile(p, block, panel * kTileRows, column + c, b + c * block.depth);
}

}  // namespace

void matmul(const MatmulParams& p) {
  check(!p.amx || may_use_tiles(), "matmul: amx needs matrix registers");
#if defined(OM_AMX)
  if (p.amx) {
    return for_float_type(p.a.dtype, [&](auto a) {
      for_float_type(p.b.dtype, [&](auto b) { TileProduct<decltype(a), decltype(b)>{p}.run(); });
    });
  }
#endif
  float* a = p.workspace.at<float>();
  float* b = a + (p.m + 12) * kMatmulDepth;
  const int64_t panels = ceil_div(p.m, kTileRows), chunks = ceil_div(p.n, kMatmulColumns);
  // Few chunks are cut across the rows too, so that every thread has work; the sums stay the same.
  const int64_t parts = chunks >= 2 * p.threads ? 1 : std::min(panels, ceil_div(2 * p.threads, chunks));
  for (int64_t k = 0; k < p.k; k += kMatmulDepth) {
    const Block block{k, static_cast<int>(std::min<int64_t>(kMatmulDepth, p.k - k)), a};
    unpack_a(p, block);
    parallel_for(p.threads, chunks * parts, [&](int64_t item, int thread) {
      const int64_t chunk = item / parts, part = item % parts;
      one_chunk(p, block, panels * part / parts, panels * (part + 1) / parts, chunk * kMatmulColumns,
                b + int64_t{thread} * kMatmulDepth * kMatmulColumns);
    });
  }
}

}  // namespace omnimamba
