// Step 1 of a slab: what all heads of a group share, and the steps dt of every head.
#pragma once
#include "../common/lanes.h"
#include "../common/parallel.h"
#include "ahead.h"
#include "decay.h"

namespace omnimamba::ssd {

// Results of step 1 for the chunks of one slab of every batch row.
struct Prepared {
  Prepared(Arena& arena, const SsdScanParams& q, const Sizes& z, bool for_backward)
      : slab(z.slab), groups(q.groups), heads(q.heads), backward(for_backward), sizes(z) {
    Arena counter(nullptr);
    GroupPack{}.take_rows(counter, z, backward);
    rows_step = counter.used();
    GroupPack{}.take_strips(counter, z, backward);
    strips_step = counter.used() - rows_step;
    rows = arena.take((backward ? q.batch * slab * groups : q.threads) * rows_step);
    strips = arena.take(q.batch * slab * groups * strips_step);
    dt = arena.take(q.batch * slab * heads * kChunk);
    slope = backward ? arena.take(q.batch * slab * heads * kChunk) : nullptr;
  }
  // c counts chunks from the slab's first. In a forward pass the rows and columns are the thread's, for step 1 alone.
  GroupPack group(int64_t b, int64_t c, int64_t g, int thread = 0) const {
    const int64_t at = (b * slab + c) * groups + g;
    Arena rows_at(rows + (backward ? at : thread) * rows_step), strips_at(strips + at * strips_step);
    GroupPack pack;
    pack.take_rows(rows_at, sizes, backward);
    pack.take_strips(strips_at, sizes, backward);
    return pack;
  }
  int64_t head(int64_t b, int64_t c, int64_t h) const { return ((b * slab + c) * heads + h) * kChunk; }

  int64_t slab, groups, heads;
  bool backward;
  const Sizes& sizes;
  int64_t rows_step, strips_step;
  float *rows, *strips;
  float* dt;     // clamp(softplus(dt + bias)), a row of kChunk a head
  float* slope;  // its derivative by dt
};

// clamp(softplus(raw)) and its derivative; a limit itself still passes the gradient on, as torch's clamp does.
OM_INLINE vf step_size(const SsdScanParams& q, vf raw) {
  vf dt = q.dt_softplus ? softplus(raw) : raw;
  dt = select(dt < splat(q.dt_low), splat(q.dt_low), dt);
  return select(dt > splat(q.dt_high), splat(q.dt_high), dt);
}
OM_INLINE vf step_slope(const SsdScanParams& q, vf raw) {
  vf dt = raw, slope = splat(1.0f);
  if (q.dt_softplus) {
    dt = softplus(raw);
    slope = select(raw > splat(20.0f), slope, sigmoid(raw));
  }
  return select(dt < splat(q.dt_low), vf{}, select(dt > splat(q.dt_high), vf{}, slope));
}

// dt of heads [h0, h1) and its slope, W heads by W positions at a time; a head's steps then lie side by side, zeros after
// the last. ahead.row() is called once a position at least.
inline void prepare_steps(const SsdScanParams& q, const Prepared& out, int64_t b, int64_t c, Chunk chunk, int64_t h0,
                          int64_t h1, Ahead& ahead) {
  for (int64_t h = h0; h < h1; h += W) {
    const int heads = static_cast<int>(std::min<int64_t>(W, h1 - h));
    for (int t = 0; t < chunk.length; t += W) {
      const int length = std::min(W, chunk.length - t);
      vf raw[W] = {};
      for (int i = 0; i < length; i++) {
        ahead.row();
        raw[i] = gather(q.dt.at<float>(b, chunk.start + t + i, h), q.dt.stride[2], heads);
      }
      transpose(raw);
      const vi inside = lane_index() < splat(static_cast<float>(length));
      for (int i = 0; i < heads; i++) {
        if (q.dt_bias) raw[i] += splat(*q.dt_bias.at<float>(h + i));
        const int64_t at = out.head(b, c, h + i) + t;
        store(out.dt + at, select(inside, step_size(q, raw[i]), vf{}));
        if (out.slope) store(out.slope + at, select(inside, step_slope(q, raw[i]), vf{}));
      }
    }
  }
}

// G = C B^T on and below the diagonal.
inline void group_scores(const GroupPack& pack, int n, int length) {
  each_tile(length, [&](auto height, int t) {
    for (int s = 0; s < std::min(length, t + kTileRows); s += kTileColumns) {
      Tile<height> tile;
      for (int k = 0; k < n; k += kChunk)
        add_states(tile, pack.C_positions, t, k, std::min(k + kChunk, n), pack.B_columns + s, kRow);
      tile_each(tile, [&](int r, int v, vf& acc) { store(pack.G + (t + r) * kRow + s + v * W, acc); });
    }
  });
}

template <class T>
void prepare_group(const SsdScanParams& q, const Sizes& z, const Prepared& out, int64_t b, int64_t c, Chunk chunk,
                   int64_t g, int thread) {
  GroupPack pack = out.group(b, c, g, thread);
  const T *B = q.B.at<T>(b, chunk.start, g), *C = q.C.at<T>(b, chunk.start, g);
  Ahead ahead;
  ahead.add(B, q.B.stride[1] * int64_t{sizeof(T)}, z.n * int64_t{sizeof(T)}, chunk.length);
  ahead.add(C, q.C.stride[1] * int64_t{sizeof(T)}, z.n * int64_t{sizeof(T)}, chunk.length);
  prepare_steps(q, out, b, c, chunk, g * z.per_group, (g + 1) * z.per_group, ahead);
  const int strips = z.state_rows / kTileRows;
  pack_rows(B, q.B.stride[1], chunk.length, z.n, pack.B_rows, z.bc_row);
  pack_columns(pack.B_rows, z.bc_row, chunk.length, z.n, z.state_rows, pack.B_columns);
  pack_strips(pack.B_rows, z.bc_row, strips, chunk.length, pack.B_states);
  pack_positions(C, q.C.stride[1], chunk.length, z.n, pack.C_positions);
  if (out.backward) {
    pack_rows(C, q.C.stride[1], chunk.length, z.n, pack.C_rows, z.bc_row);
    pack_columns(pack.C_rows, z.bc_row, chunk.length, z.n, z.state_rows, pack.C_columns);
    pack_strips(pack.C_rows, z.bc_row, strips, chunk.length, pack.C_states);
    pack_positions(B, q.B.stride[1], chunk.length, z.n, pack.B_positions);
  }
  group_scores(pack, z.n, chunk.length);
}

// Parts of step 1 for a slab: one a batch row, chunk and group.
inline int64_t slab_parts(const SsdScanParams& q, const Sizes& z) { return q.batch * z.slab * q.groups; }

// One part of chunks [c0, c0 + slab).
template <class T>
void prepare_part(const SsdScanParams& q, const Sizes& z, const Prepared& out, int64_t c0, int64_t part, int thread) {
  int64_t g = part % q.groups, c = part / q.groups % z.slab, b = part / q.groups / z.slab;
  Chunks chunks(q, b);
  if (c0 + c >= chunks.count) return;
  Chunk chunk = chunks[c0 + c];
  if (chunk.kind != ChunkKind::Padding) prepare_group<T>(q, z, out, b, c, chunk, g, thread);
}

template <class T>
void prepare_slab(const SsdScanParams& q, const Sizes& z, const Prepared& out, int64_t c0) {
  parallel_tasks(q.threads, slab_parts(q, z),
                 [&](int64_t part, int thread) { prepare_part<T>(q, z, out, c0, part, thread); });
}

}  // namespace omnimamba::ssd
