// bf16 weights against few rows of any float type, by tiles of matrix registers (common/amx.h).
//
// Maths    y^T = W x^T: a tile of 16 weight rows x 32 k, as it lies in memory, times a tile of 32 k x 16 columns. A column
//          is one bf16 piece of one row of x (cpu_pieces.h): 16 rows of bf16, 8 of float16 or 5 of float32 fill a tile.
//          The pieces' sums are added at the end, the smaller ones first. A row's first piece meets an infinite weight
//          as the row itself would; its other ones, 0 perhaps, would make it NaN, so they count only beside finite sums.
// Plan     A tile of weights runs through k and meets up to four tiles of columns. A thread asks for weights so many lines
//          before it needs them, of this row of tiles or the next; 16 rows at a time are as many streams as a processor's
//          own prefetching follows.
// Order    Each sum takes k in order; which tile it is in changes nothing: the bits of a row depend on no other row.
// Traffic  the weights once, columns from cache.
#pragma once
#include "common/parallel.h"
#include "lora_linear/cpu_pieces.h"
#include "lora_linear/lora_linear.h"

namespace omnimamba {
namespace {

#if defined(OM_AMX)

constexpr int kFewTiles = 4;         // of columns that meet a tile of weights at a time
constexpr int64_t kStepsAhead = 16;  // tiles of 32 k from the one in use to the one asked for

inline int64_t tile_steps(int64_t in) { return (in + kTileDepth - 1) / kTileDepth; }

// Rows [first, first + count) of x as columns of tiles, one tile a step of k.
template <class TX>
void take_columns(const LoraLinearParams& p, int64_t first, int64_t count, char* to) {
  constexpr int P = kPieces<TX>;
  for (int64_t k = 0; k < p.in; k += kTileDepth, to += kTileBytes) {
    const auto n = static_cast<int>(std::min<int64_t>(kTileDepth, p.in - k));
    vu tile[W] = {};
    for (int64_t r = 0; r < count; r++) pairs_of(p.x.at<TX>(first + r) + k, n, tile + r * P);
    transpose_pairs(tile);
    std::memcpy(to, tile, sizeof tile);
  }
}

struct TileAt {
  const void* data;
  int64_t row_bytes;
};

// 16 rows of weights from o and 32 of their columns from k: in place, or in `spare` with zeros beyond the matrix.
OM_INLINE TileAt weight_tile(const LoraLinearParams& p, int64_t o, int64_t k, char* spare) {
  const int64_t row_bytes = p.weight.stride[0] * 2;
  const char* from = static_cast<const char*>(p.weight.data) + o * row_bytes + k * 2;
  if (o + kTileLanes <= p.out && k + kTileDepth <= p.in) return {from, row_bytes};
  const auto n = static_cast<size_t>(std::min<int64_t>(kTileDepth, p.in - k));
  std::memset(spare, 0, kTileBytes);
  for (int64_t r = 0; r < std::min<int64_t>(kTileLanes, p.out - o); r++)
    std::memcpy(spare + r * 64, from + r * row_bytes, n * 2);
  return {spare, 64};
}

// Asks for the weights that are needed kStepsAhead steps after this one.
OM_INLINE void ask_ahead(const LoraLinearParams& p, int64_t o, int64_t step, int64_t steps) {
  int64_t then = step + kStepsAhead;
  for (; then >= steps; then -= steps) o += kTileLanes;
  if (o + kTileLanes > p.out) return;
  const bf16* w = p.weight.at<bf16>(o) + then * kTileDepth;
#pragma GCC unroll 16
  for (int r = 0; r < kTileLanes; r++, w += p.weight.stride[0]) __builtin_prefetch(w, 0, 2);
}

// sums[j][out][column] of one tile of outputs and column tile j < N. With `ask` the weights are not in a cache yet.
template <int N>
OM_AMX void row_of_tiles(const LoraLinearParams& p, int64_t o, const char* x, bool ask, float (*sums)[kTileLanes][W]) {
  alignas(64) char spare[kTileBytes];
  const int64_t steps = tile_steps(p.in), next = steps * kTileBytes;
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
  for (int64_t step = 0; step < steps; step++, x += kTileBytes) {
    if (ask) ask_ahead(p, o, step, steps);
    const TileAt weights = weight_tile(p, o, step * kTileDepth, spare);
    tile_load(6, weights.data, weights.row_bytes);
    tile_load(4, x, 64);
    tile_multiply(0, 6, 4);
    if constexpr (N > 1) {
      tile_load(5, x + next, 64);
      tile_multiply(1, 6, 5);
    }
    if constexpr (N > 2) {
      tile_load(4, x + 2 * next, 64);
      tile_multiply(2, 6, 4);
    }
    if constexpr (N > 3) {
      tile_load(5, x + 3 * next, 64);
      tile_multiply(3, 6, 5);
    }
  }
  tile_store(0, sums[0]);
  if constexpr (N > 1) tile_store(1, sums[1]);
  if constexpr (N > 2) tile_store(2, sums[2]);
  if constexpr (N > 3) tile_store(3, sums[3]);
}

// Adds bias and adapter to one row's sums of outputs [o, o + n), and writes them as y.
template <class TY>
OM_INLINE void finish_vector(const LoraLinearParams& p, const float* low, int64_t row, int64_t o, int n, vf value) {
  if (p.bias)
    for_float_type(p.bias.dtype, [&](auto b) { value += gather(p.bias.at<decltype(b)>(o), p.bias.stride[0], n); });
  if (const int t = p.task ? *p.task.at<int32_t>(row) : -1; t >= 0)
    for_float_type(p.lora_B.dtype, [&](auto b) {
      const auto* up = p.lora_B.at<decltype(b)>(t, o);
      vf total{};
      for (int64_t r = 0; r < p.rank; r++)
        total += splat(low[row * p.rank + r]) * gather(up + r, p.lora_B.stride[1], n);
      value += total;
    });
  store_some(p.y.at<TY>(row, o), value, n);
}

// The rows of one column tile, from their sums at 16 outputs.
template <class TX>
void finish_tile(const LoraLinearParams& p, const float* low, int64_t first, int64_t o, const float (*sums)[W]) {
  constexpr int P = kPieces<TX>;
  const auto n = static_cast<int>(std::min<int64_t>(kTileLanes, p.out - o));
  vf column[W];
  std::memcpy(column, sums, sizeof column);
  transpose(column);
  for (int64_t r = 0; r < std::min<int64_t>(kTileLanes / P, p.rows - first); r++) {
    vf value = column[r * P], rest{};
    for (int i = P - 1; i > 0; i--) rest += column[r * P + i];
    if constexpr (P > 1) value = select(vabs(value) < splat(__builtin_inff()), value + rest, value);
    finish_vector<TX>(p, low, first + r, o, n, value);
  }
}

// y, from x as columns in `space`; project(low) brings the adapters' sums (rows, rank) behind them.
template <class TX, class Project>
void few_rows_by_tiles(const LoraLinearParams& p, int threads, char* space, Project&& project) {
  constexpr int rows = kTileLanes / kPieces<TX>;
  const int64_t tiles = (p.rows + rows - 1) / rows, bytes = tile_steps(p.in) * kTileBytes;
  parallel_for(tiles > 1 ? threads : 1, tiles, [&](int64_t i, int) {
    take_columns<TX>(p, i * rows, std::min<int64_t>(rows, p.rows - i * rows), space + i * bytes);
  });
  auto* low = reinterpret_cast<float*>(space + tiles * bytes);
  project(low);
  constexpr decltype(&row_of_tiles<1>) multiply[] = {row_of_tiles<1>, row_of_tiles<2>, row_of_tiles<3>,
                                                     row_of_tiles<4>};
  parallel_parts(threads, (p.out + kTileLanes - 1) / kTileLanes, [&](int64_t begin, int64_t end, int) {
    const Tiles configured;
    alignas(64) float sums[kFewTiles][kTileLanes][W];
    for (int64_t o = begin * kTileLanes; o < std::min(end * kTileLanes, p.out); o += kTileLanes)
      for (int64_t tile = 0; tile < tiles; tile += kFewTiles) {
        const int64_t count = std::min<int64_t>(kFewTiles, tiles - tile);
        multiply[count - 1](p, o, space + tile * bytes, tile == 0, sums);
        for (int64_t j = 0; j < count; j++) finish_tile<TX>(p, low, (tile + j) * rows, o, sums[j]);
      }
  });
}

#endif

}  // namespace
}  // namespace omnimamba
