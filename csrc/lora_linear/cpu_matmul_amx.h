// The product of matmul.h by tiles of matrix registers (common/amx.h), where operands are bf16 or pieces of it
// (cpu_pieces.h).
//
// Maths    c = start + p0 q0 + sum of the other p_i q_j, over the pieces p of a and q of b. The first product and the sum
//          of the others are kept apart until the end: where the first is infinite or NaN it is the result, as the others
//          might multiply an infinity by a piece of 0.
// Plan     kBlockRows rows of a at a time are cut into tiles, all of k, shared by the threads. A thread takes a chunk of
//          columns. For each kSliceDepth of k it cuts its part of b into tiles, which stay in the second cache level, and
//          for every 32 rows runs a slice of a, which stays in the first, past all of them: 2 x 2 tiles of c in registers,
//          each tile loaded multiplies two others. Sums wait in memory of the thread's own between slices, and go to c
//          once, in any type.
// Order    Each sum takes k in order in one chain, whoever computes it.
// Traffic  a once, b once a block of rows, start and c once.
#pragma once
#include "common/parallel.h"
#include "lora_linear/cpu_pieces.h"
#include "lora_linear/matmul.h"

namespace omnimamba {
namespace {

#if defined(OM_AMX)

constexpr int kPanel = 2 * kTileLanes;  // rows of a or columns of b that lie side by side in tiles
constexpr int kSliceSteps = 16;         // tiles of 32 k in a slice
constexpr int kSliceDepth = kSliceSteps * kTileDepth;
constexpr int kSquare = 4 * kTileLanes * kTileLanes;  // sums of a panel of rows and one of columns

// What is cut into tiles, in bytes of one piece: panel after panel, in each step after step.
struct Shape {
  int64_t k;
  int pieces;

  int64_t slices() const { return (k + kSliceDepth - 1) / kSliceDepth; }
  int64_t steps(int64_t slice) const {
    return (std::min<int64_t>(kSliceDepth, k - slice * kSliceDepth) + kTileDepth - 1) / kTileDepth;
  }
  int64_t panel_bytes(int64_t slice) const { return pieces * steps(slice) * 2 * kTileBytes; }
};

// Asks for 32 lanes' values some steps ahead, in this panel or the next: rows far apart are not foreseen by the processor.
template <class T>
OM_INLINE void ask_lanes(const Operand<T>& x, int64_t lane, int64_t k) {
  if (x.k_step != 1 || lane + kPanel > x.lanes) return;
  const T* from = x.from + lane * x.lane_step + k;
#pragma GCC unroll 8
  for (int i = 0; i < kPanel; i++, from += x.lane_step)
    for (size_t byte = 0; byte < kTileDepth * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
}

// One panel of one slice: [piece][step][2 tiles].
template <bool ByPairs, class T>
void cut_panel(const Operand<T>& x, int64_t lane, int64_t slice, int64_t steps, char* to) {
  constexpr int64_t kAhead = 6;
  for (int64_t step = 0; step < steps; step++) {
    const int64_t k = slice * kSliceDepth + step * kTileDepth, over = step + kAhead - steps;
    if (over < 0)
      ask_lanes(x, lane, k + kAhead * kTileDepth);
    else
      ask_lanes(x, lane + kPanel, slice * kSliceDepth + over * kTileDepth);
    for (int half = 0; half < 2; half++) {
      const int64_t first = lane + half * kTileLanes;
      if constexpr (kPieces<T> == 1)
        if (x.k_step == 1 && first + kTileLanes <= x.lanes && k + kTileDepth <= x.k) {
          take_whole_tile<ByPairs>(x.from + first * x.lane_step + k, x.lane_step, to + (step * 2 + half) * kTileBytes);
          continue;
        }
      vu tile[kPieces<T>][W];
      take_tile<ByPairs>(x, first, k, tile);
      for (int piece = 0; piece < kPieces<T>; piece++)
        std::memcpy(to + ((piece * steps + step) * 2 + half) * kTileBytes, tile[piece], kTileBytes);
    }
  }
}

// Adds a slice of one piece of a panel of rows times one of a panel of columns to their sums.
OM_AMX inline void add_square(const char* a, const char* b, int64_t steps, float (*sums)[kTileLanes][W]) {
  tile_load(0, sums[0], 64);
  tile_load(1, sums[1], 64);
  tile_load(2, sums[2], 64);
  tile_load(3, sums[3], 64);
  for (int64_t step = 0; step < steps; step++, a += 2 * kTileBytes, b += 2 * kTileBytes) {
    tile_load(4, a, 64);
    tile_load(6, b, 64);
    tile_multiply(0, 4, 6);
    tile_load(7, b + kTileBytes, 64);
    tile_multiply(1, 4, 7);
    tile_load(5, a + kTileBytes, 64);
    tile_multiply(2, 5, 6);
    tile_multiply(3, 5, 7);
  }
  tile_store(0, sums[0]);
  tile_store(1, sums[1]);
  tile_store(2, sums[2]);
  tile_store(3, sums[3]);
}

typedef float Square[4][kTileLanes][W];

template <class TA, class TB>
struct TileProduct {
  static constexpr int PA = kPieces<TA>, PB = kPieces<TB>, CHAINS = PA * PB > 1 ? 2 : 1;
  static constexpr int64_t BLOCK_ROWS = kMatmulBlockRows / CHAINS;
  const MatmulParams& p;
  const Shape a{p.k, PA}, b{p.k, PB};

  // Row panels [first, last) of the block against columns [column, column + columns), in memory of this thread.
  void chunk(const char* a_tiles, int64_t row, int64_t first, int64_t last, int64_t panels, int64_t column,
             int64_t columns, char* own) const {
    const Tiles configured;
    const Operand<TB> from{p.b.at<TB>(0, column), p.b.stride[1], p.b.stride[0], columns, p.k};
    const int64_t across = (columns + kPanel - 1) / kPanel;
    auto* sums = reinterpret_cast<Square*>(own);
    char* b_tiles = own + (last - first) * across * CHAINS * int64_t{sizeof(Square)};
    std::memset(own, 0, static_cast<size_t>(b_tiles - own));
    for (int64_t slice = 0; slice < a.slices(); slice++) {
      const int64_t steps = a.steps(slice), piece = steps * 2 * kTileBytes;
      for (int64_t i = 0; i < across; i++)
        cut_panel<true>(from, i * kPanel, slice, steps, b_tiles + i * b.panel_bytes(slice));
      for (int64_t panel = first; panel < last; panel++)
        for (int64_t i = 0; i < across; i++) {
          const char* rows = a_tiles + panel * a.panel_bytes(slice);
          const char* cols = b_tiles + i * b.panel_bytes(slice);
          Square* square = sums + ((panel - first) * across + i) * CHAINS;
          for (int pa = PA - 1; pa >= 0; pa--)
            for (int pb = PB - 1; pb >= 0; pb--)
              if (pa + pb < 3) add_square(rows + pa * piece, cols + pb * piece, steps, square[pa + pb > 0]);
        }
      a_tiles += panels * a.panel_bytes(slice);
    }
    for_float_type(p.c.dtype, [&](auto c) {
      for (int64_t panel = first; panel < last; panel++)
        write<decltype(c)>(sums + (panel - first) * across * CHAINS, row + panel * kPanel, column, columns);
    });
  }

  // 32 rows of a chunk of c.
  template <class TC>
  void write(const Square* sums, int64_t row, int64_t column, int64_t columns) const {
    for (int64_t r = 0; r < std::min<int64_t>(kPanel, p.m - row); r++)
      for (int64_t j = 0; j < columns; j += W) {
        const auto n = static_cast<int>(std::min<int64_t>(W, columns - j));
        const Square* square = sums + j / kPanel * CHAINS;
        const int64_t tile = r / kTileLanes * 2 + j % kPanel / kTileLanes;
        vf value = load(square[0][tile][r % kTileLanes]);
        if constexpr (CHAINS == 2) {
          const vf rest = load(square[1][tile][r % kTileLanes]);
          value = select(vabs(value) < splat(__builtin_inff()), value + rest, value);
        }
        if (p.start) value += load_some(p.start.at<float>(row + r, column + j), n);
        store_some(p.c.at<TC>(row + r, column + j), value, n);
      }
  }

  void run() const {
    char* a_tiles = p.workspace.at<char>();
    const int64_t padded = (p.k + kTileDepth - 1) / kTileDepth * kTileDepth;
    const int64_t rows = std::min<int64_t>(BLOCK_ROWS, (p.m + kPanel - 1) / kPanel * kPanel);
    char* own = a_tiles + rows * padded * 2 * PA;
    const int64_t own_bytes = rows * CHAINS * kMatmulChunk * 4 + int64_t{kMatmulChunk} * kSliceDepth * 2 * PB;
    const int64_t panels_n = (p.n + kPanel - 1) / kPanel;
    const int64_t chunks = (panels_n + kMatmulChunk / kPanel - 1) / (kMatmulChunk / kPanel);
    const int64_t width = (panels_n + chunks - 1) / chunks * kPanel;
    for (int64_t row = 0; row < p.m; row += BLOCK_ROWS) {
      const Operand<TA> from{p.a.at<TA>(row), p.a.stride[0], p.a.stride[1], std::min(BLOCK_ROWS, p.m - row), p.k};
      const int64_t panels = (from.lanes + kPanel - 1) / kPanel;
      parallel_for(p.threads, panels, [&](int64_t panel, int) {
        char* to = a_tiles;
        for (int64_t slice = 0; slice < a.slices(); to += panels * a.panel_bytes(slice), slice++)
          cut_panel<false>(from, panel * kPanel, slice, a.steps(slice), to + panel * a.panel_bytes(slice));
      });
      const int64_t parts = chunks >= 2 * p.threads ? 1 : std::min(panels, (2 * p.threads + chunks - 1) / chunks);
      parallel_for(p.threads, chunks * parts, [&](int64_t item, int thread) {
        const int64_t column = item / parts * width, part = item % parts;
        if (column < p.n)
          chunk(a_tiles, row, panels * part / parts, panels * (part + 1) / parts, panels, column,
                std::min(width, p.n - column), own + thread * own_bytes);
      });
    }
  }
};

#endif

}  // namespace
}  // namespace omnimamba
