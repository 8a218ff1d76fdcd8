// Sums and scans over lanes, warps and blocks, always in the same order.
#pragma once
#include "memory.cuh"

namespace omnimamba {

// The sum over LANES neighbouring lanes (a power of two), in each of them. All lanes of the warp call it.
template <int LANES = WARP, class T>
OM_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) v += shuffle_xor(v, distance);
  return v;
}

template <int LANES = WARP>
OM_DEVICE float warp_max(float v) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) v = fmaxf(v, shuffle_xor(v, distance));
  return v;
}

// The sum over this lane and those below it among LANES neighbours.
template <int LANES = WARP, class T>
OM_DEVICE T warp_scan(T v) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const T below = shuffle_up(v, distance);
    if (lane_id() % LANES >= distance) v += below;
  }
  return v;
}

// The sums over the block's threads of N values each, in every thread. `scratch` holds N floats a warp and is free
// again when the next block-wide barrier is passed.
template <int N>
OM_DEVICE void block_sum(float (&v)[N], float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / WARP;
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = warp_sum(v[i]);
  if (warps == 1) return;
  sync_block();
  if (lane_id() == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) scratch[warp_id() * N + i] = v[i];
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = warp_sum(lane_id() < warps ? scratch[lane_id() * N + i] : 0.0f);
}

// The sum over this thread and those before it; scratch as above, N = 1.
OM_DEVICE float block_scan(float v, float* scratch) {
  const int warps = static_cast<int>(blockDim.x) / WARP;
  v = warp_scan(v);
  sync_block();
  if (lane_id() == WARP - 1) scratch[warp_id()] = v;
  sync_block();
  const float ends = warp_scan(lane_id() < warps ? scratch[lane_id()] : 0.0f);
  const float before = shuffle(ends, warp_id() > 0 ? warp_id() - 1 : 0);
  return warp_id() > 0 ? before + v : v;
}

}  // namespace omnimamba
