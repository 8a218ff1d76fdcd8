// Copies between the caller's layout and the kernels' own: float32, whole vectors, zeros around.
#pragma once
#include <cstring>

#include "../common/transpose.h"
#include "layout.h"

namespace omnimamba::ssd {

// The first `left` of W values; zeros beyond.
template <class T>
OM_INLINE vf load_left(const T* p, int left) {
  return left >= W ? load(p) : left > 0 ? load_part(p, left) : vf{};
}
template <class T>
OM_INLINE void store_left(T* p, vf v, int left) {
  if (left >= W) {
    store(p, v);
  } else if (left > 0) {
    store_part(p, v, left);
  }
}

// `length` rows of `width` values, one every `step`, into rows of `out_row` floats.
template <class T>
void pack_rows(const T* in, int64_t step, int length, int width, float* out, int64_t out_row) {
  for (int t = 0; t < length; t++)
    for (int c = 0; c < out_row; c += W) store(out + t * out_row + c, load_left(in + t * step + c, width - c));
}

// out[c][t] = rows[t][c] for t < length, zero up to kRow; `height` rows of out.
inline void pack_columns(const float* rows, int64_t row, int length, int width, int height, float* out) {
  transpose(rows, row, length, width, out, kRow);
  for (int c = 0; c < height; c++) {
    int from = c < width ? length : 0;
    std::memset(out + c * kRow + from, 0, sizeof(float) * static_cast<size_t>(kRow - from));
  }
}

// Rows of B or C as the row operand of a product over the states, in blocks of kChunk states: out[block][t][kRow]. The step
// from row to row is then a constant, and the lines of a tile's rows lie in different cache sets.
constexpr int64_t block_floats() { return int64_t{kChunk} * kRow; }

template <class T>
void pack_positions(const T* in, int64_t step, int length, int n, float* out) {
  for (int k = 0; k < n; k += kChunk, out += block_floats())
    for (int t = 0; t < length; t++)
      for (int i = 0; i < std::min(kChunk, n - k); i += W)
        store(out + t * kRow + i, load_left(in + t * step + k + i, n - k - i));
}

// tile += positions[t0 ...] columns, over states [k0, k1) of one block.
template <int Rows>
OM_INLINE void add_states(Tile<Rows>& tile, const float* positions, int t0, int k0, int k1, const float* columns,
                          int64_t column_k) {
  const float* rows = positions + k0 / kChunk * block_floats() + t0 * kRow + k0 % kChunk;
  tile_add<kRow>(tile, k1 - k0, rows, 1, columns + k0 * column_k, column_k);
}

// The row operand of a product in strips of kTileRows rows, `depth` deep:
// out[strip][k][r] = columns[k][strip * kTileRows + r].
inline void pack_strips(const float* columns, int64_t step, int strips, int depth, float* out) {
  for (int strip = 0; strip < strips; strip++, columns += kTileRows)
    for (int k = 0; k < depth; k++, out += kTileRows) std::memcpy(out, columns + k * step, sizeof(float) * kTileRows);
}

// A head's rows (t, p) as panels of kTileColumns columns: panel j begins at j * panel_floats().
constexpr int64_t panel_floats() { return int64_t{kRow} * kTileColumns; }

template <class T>
void pack_panels(const T* in, int64_t step, int length, const Sizes& z, float* out) {
  for (int j = 0; j < z.panels; j++, out += panel_floats())
    for (int t = 0; t < length; t++)
      for (int v = 0; v < kTileColumns; v += W)
        store(out + t * kTileColumns + v, load_left(in + t * step + j * kTileColumns + v, z.p - j * kTileColumns - v));
}

// One panel of a state, n x kTileColumns inside, (p, n) rows outside.
inline void load_state(const float* in, int64_t p_step, int64_t n_step, const Sizes& z, int panel, float* out) {
  int columns = std::min(kTileColumns, z.p - panel * kTileColumns);
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(z.state_panel));
  in += panel * kTileColumns * p_step;
  if (n_step == 1) return transpose(in, p_step, columns, z.n, out, kTileColumns);
  for (int c = 0; c < columns; c++)
    for (int i = 0; i < z.n; i++) out[i * kTileColumns + c] = in[c * p_step + i * n_step];
}

inline void store_state(const float* in, const Sizes& z, int panel, float* out, int64_t p_step, int64_t n_step) {
  int columns = std::min(kTileColumns, z.p - panel * kTileColumns);
  out += panel * kTileColumns * p_step;
  if (n_step == 1) return transpose(in, kTileColumns, z.n, columns, out, p_step);
  for (int c = 0; c < columns; c++)
    for (int i = 0; i < z.n; i++) out[c * p_step + i * n_step] = in[i * kTileColumns + c];
}

}  // namespace omnimamba::ssd
