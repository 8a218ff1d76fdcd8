// Step 1 of a slab: what all heads of a group share, and the steps dt of every head.
#pragma once
#include "../common/parallel.h"
#include "decay.h"

namespace omnimamba::ssd {

// Results of step 1 for the chunks of one slab of every batch row.
struct Prepared {
  Prepared(Arena& arena, const SsdScanParams& q, const Sizes& z, bool slopes)
      : slab(z.slab), groups(q.groups), heads(q.heads), sizes(z) {
    Arena counter(nullptr);
    GroupPack::take(counter, z);
    step = counter.used();
    packs = arena.take(q.batch * slab * groups * step);
    dt = arena.take(q.batch * slab * heads * kChunk);
    slope = slopes ? arena.take(q.batch * slab * heads * kChunk) : nullptr;
  }
  // c counts chunks from the slab's first.
  GroupPack group(int64_t b, int64_t c, int64_t g) const {
    Arena arena(packs + ((b * slab + c) * groups + g) * step);
    return GroupPack::take(arena, sizes);
  }
  int64_t head(int64_t b, int64_t c, int64_t h) const { return ((b * slab + c) * heads + h) * kChunk; }

  int64_t slab, groups, heads, step;
  const Sizes& sizes;
  float* packs;
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

// dt of heads [h0, h1), W heads at a time; a head's steps then lie side by side.
inline void prepare_steps(const SsdScanParams& q, const Prepared& out, int64_t b, int64_t c, Chunk chunk, int64_t h0,
                          int64_t h1) {
  for (int64_t h = h0; h < h1; h += W) {
    int heads = static_cast<int>(std::min<int64_t>(W, h1 - h));
    vf bias{};
    for (int i = 0; i < heads && q.dt_bias; i++) bias[i] = *q.dt_bias.at<float>(h + i);
    for (int t = 0; t < chunk.length; t++) {
      float raw[W] = {}, dt[W], slope[W];
      for (int i = 0; i < heads; i++) raw[i] = *q.dt.at<float>(b, chunk.start + t, h + i);
      store(dt, step_size(q, load(raw) + bias));
      if (out.slope) store(slope, step_slope(q, load(raw) + bias));
      for (int i = 0; i < heads; i++) {
        out.dt[out.head(b, c, h + i) + t] = dt[i];
        if (out.slope) out.slope[out.head(b, c, h + i) + t] = slope[i];
      }
    }
  }
}

// G = C B^T on and below the diagonal.
inline void group_scores(const GroupPack& pack, int n, int length) {
  for (int t = 0; t < length; t += kTileRows)
    for (int s = 0; s < std::min(length, t + kTileRows); s += kTileColumns) {
      Tile tile;
      tile_add<1>(tile, n, pack.C_columns + t, kRow, pack.B_columns + s, kRow);
      tile_each(tile, [&](int r, int v, vf& acc) { store(pack.G + (t + r) * kRow + s + v * W, acc); });
    }
}

template <class T>
void prepare_group(const SsdScanParams& q, const Sizes& z, const Prepared& out, int64_t b, int64_t c, Chunk chunk,
                   int64_t g) {
  prepare_steps(q, out, b, c, chunk, g * z.per_group, (g + 1) * z.per_group);
  GroupPack pack = out.group(b, c, g);
  pack_rows(q.B.at<T>(b, chunk.start, g), q.B.stride[1], chunk.length, z.n, pack.B_rows, z.bc_row);
  pack_rows(q.C.at<T>(b, chunk.start, g), q.C.stride[1], chunk.length, z.n, pack.C_rows, z.bc_row);
  pack_columns(pack.B_rows, z.bc_row, chunk.length, z.n, z.state_rows, pack.B_columns);
  pack_columns(pack.C_rows, z.bc_row, chunk.length, z.n, z.state_rows, pack.C_columns);
  group_scores(pack, z.n, chunk.length);
}

// Chunks [c0, c0 + slab) of every batch row.
template <class T>
void prepare_slab(const SsdScanParams& q, const Sizes& z, const Prepared& out, int64_t c0) {
  parallel_for(q.threads, q.batch * z.slab * q.groups, [&](int64_t unit, int) {
    int64_t g = unit % q.groups, c = unit / q.groups % z.slab, b = unit / q.groups / z.slab;
    Chunks chunks(q, b);
    if (c0 + c >= chunks.count) return;
    Chunk chunk = chunks[c0 + c];
    if (chunk.kind != ChunkKind::Padding) prepare_group<T>(q, z, out, b, c, chunk, g);
  });
}

}  // namespace omnimamba::ssd
