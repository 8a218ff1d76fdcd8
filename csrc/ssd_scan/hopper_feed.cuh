// What feeds the walkers of the scan's Hopper kernel: the chunk's inputs, without what padding holds, and the scores M.
#pragma once
#include "hopper_block.cuh"

namespace omnimamba::ssd {

// One thread: the inputs of each chunk, as far as there are free stages.
template <int N>
OM_DEVICE void fetch_chunks(const Walk<N>& walk) {
  const SsdScanParams& q = walk.q;
  const Maps& maps = walk.maps;
  const auto group = static_cast<int>(walk.at.group), b = static_cast<int>(walk.at.b);
  const int n0 = group * maps.groups_apart, own_group = maps.groups_apart ? 0 : group;
  const int tiles = 2 * walk.PANELS + walk.at.live_heads * walk.live_halves * (q.z ? 2 : 1);
#pragma unroll 1
  for (int chunk = walk.first; chunk < walk.last; chunk++) {
    const int s = walk.stage_of(chunk), t0 = chunk * SIDE;
    Mbarrier* landed = walk.signal.landed + s;
    if (chunk - walk.first >= walk.layout.stages) mbarrier_wait(walk.signal.empty + s, walk.turn_of(chunk) ^ 1);
    mbarrier_arrive_expect(landed, tiles * TILE_BYTES + walk.at.live_heads * STEP_BYTES);
    unsigned char* stage = walk.stage(chunk);
#pragma unroll 1
    for (int panel = 0; panel < walk.PANELS; panel++) {
      tensor_load(stage + panel * TILE_BYTES, maps.B, landed, n0 + panel * SIDE, own_group, t0, b);
      tensor_load(stage + walk.layout.C + panel * TILE_BYTES, maps.C, landed, n0 + panel * SIDE, own_group, t0, b);
    }
#pragma unroll 1
    for (int head = 0; head < walk.at.live_heads; head++) {
      const auto h = static_cast<int>(walk.at.first_head) + head, own_head = maps.heads_apart ? 0 : h;
      bulk_load(stage + walk.layout.steps + head * STEP_BYTES, steps_of<bf16>(q, b, h, chunk), STEP_BYTES, landed);
      for (int half = 0; half < walk.live_halves; half++) {
        const int slot = (head * walk.halves + half) * TILE_BYTES, p0 = h * maps.heads_apart + walk.at.p0 + half * SIDE;
        tensor_load(stage + walk.layout.x + slot, maps.x, landed, p0, own_head, t0, b);
        if (q.z) tensor_load(stage + walk.layout.z + slot, maps.z, landed, p0, own_head, t0, b);
      }
    }
  }
}

// One warp, where there may be padding: what lies in its rows becomes zeros, before anybody reads the chunk.
template <int N>
OM_DEVICE void clean_chunks(const Walk<N>& walk) {
#pragma unroll 1
  for (int chunk = walk.first; chunk < walk.last; chunk++) {
    const int s = walk.stage_of(chunk), tiles = 2 * walk.PANELS + walk.layout.slots;
    const uint64_t used = used_bits<bf16>(walk.q, walk.at.b, chunk);
    mbarrier_wait(walk.signal.landed + s, walk.turn_of(chunk));
    clear_padding(walk.stage(chunk), tiles, used);
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(walk.signal.clean + s);
  }
}

// M of a head from C B^T, as a warpgroup's accumulators hold it: a warp has 16 positions t. Decays to them from positions
// before the 16 have the last of those as an anchor.
OM_DEVICE void write_scores(const Rows<bf16, SIDE>& M, const float* steps, const float (&G)[SIDE / 2]) {
  const float *dt = steps + DT * SIDE, *cum = steps + HIGH * SIDE;
  const int warp = warp_id() % (TEAM / WARP), t = 16 * warp + state_row(0);
  const float anchor = warp > 0 ? cum[16 * warp - 1] : 0.0f;
  const float from_anchor[2] = {power_of_two(cum[t] - anchor), power_of_two(cum[t + 8] - anchor)};
#pragma unroll
  for (int j = 0; j < SIDE / 8; j++) {
    const int s = 8 * j + state_column(0);
    float m[4] = {};
    if (j < 2 * warp) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float to_anchor = power_of_two(anchor - cum[s + k]) * dt[s + k];
        m[k] = scaled(G[4 * j + k], from_anchor[0] * to_anchor);
        m[2 + k] = scaled(G[4 * j + 2 + k], from_anchor[1] * to_anchor);
      }
    } else if (j <= 2 * warp + 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = t + i / 2 * 8, column = s + i % 2;
        const float L = column <= row ? power_of_two(cum[row] - cum[column]) : 0.0f;
        m[i] = scaled(G[4 * j + i], L * dt[column]);
      }
    }
    store_pack(M.at(t, s), Pack<uint32_t, 1>{pack_two<bf16>(m[0], m[1])});
    store_pack(M.at(t + 8, s), Pack<uint32_t, 1>{pack_two<bf16>(m[2], m[3])});
  }
}

// A warpgroup: C B^T of each chunk, and from it M of each head.
template <int N>
OM_DEVICE void score_chunks(const Walk<N>& walk) {
#pragma unroll 1
  for (int chunk = walk.first; chunk < walk.last; chunk++) {
    walk.wait_for_stage(chunk);
    const unsigned char* stage = walk.stage(chunk);
    float G[SIDE / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; k++)
      wgmma<bf16, SIDE>(G, by_columns(stage + walk.layout.C, k), by_columns(stage, k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(G);
#pragma unroll 1
    for (int head = 0; head < walk.at.live_heads; head++) {
      const int i = walk.score_index(chunk, head), turn = walk.score_turn(chunk);
      if (turn > 0) mbarrier_wait(walk.signal.spare + i, (turn - 1) % 2);
      write_scores(rows_of(walk.scores(chunk, head)), walk.steps(stage, head), G);
      async_fence();
      mbarrier_arrive(walk.signal.ready + i);
    }
    walk.leave_stage(chunk);
  }
}

}  // namespace omnimamba::ssd
