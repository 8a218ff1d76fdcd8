// What the CUDA kernels of the LoRA linear layer share: the dropout mask, and products of matrices of which one has few rows.
#pragma once
#include "../common/launch.h"
#include "../common/mma.cuh"
#include "gpu.h"

namespace omnimamba {

// A bijection of 32-bit integers whose output bits all depend on all input bits.
OM_DEVICE uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

// Whether dropout keeps element (row, column) of a matrix so wide, as in reference.py.
template <class Params>
OM_DEVICE bool kept(const Params& p, int64_t row, int64_t column, int64_t width) {
  const uint64_t position = static_cast<uint64_t>(row) * static_cast<uint64_t>(width) + static_cast<uint64_t>(column);
  const uint32_t key = mix(static_cast<uint32_t>(position >> 32) ^ mix(p.seed));
  return mix(static_cast<uint32_t>(position) ^ key) >= p.threshold;
}

// ---- 16 MT rows of P times 8 NT rows of Q, both contiguous along the depth ----

constexpr int SKINNY_DEPTH = 32;  // of one step of a warp
using Eight = Pack<uint32_t, 4>;  // 8 neighbours of a 16-bit type

// acc += P Q^T over the depths first .. first + 31, first + step .., for one warp. A lane gives its rows: p[m][h] is row
// 16 m + lane / 4 + 8 h, q[n] row 8 n + lane / 4, null where there is none; 16-byte aligned, depth a multiple of 8.
// About AHEAD packs of 16 bytes are on their way at a time.
//
// Nothing passes shared memory: the sum over the depth does not mind its order, so the 16 bytes that a lane reads, 8
// neighbours, stand for the elements that it holds in two products, half of them each, in P and in Q alike.
template <class T, int AHEAD, int MT, int NT, class Change>
OM_DEVICE void skinny_product(float (&acc)[MT][NT][4], const T* const (&p)[MT][2], const T* const (&q)[NT],
                              int64_t depth, int64_t first, int64_t step, Change&& change) {
  [[maybe_unused]] constexpr int EACH = 2 * MT + NT, UNROLL = EACH > AHEAD / 2   ? 1
                                                              : EACH > AHEAD / 4 ? AHEAD / EACH
                                                                                 : 4;
#pragma unroll UNROLL
  for (int64_t start = first; start < depth; start += step) {
    const int64_t k = start + lane_id() % 4 * 8;
    Eight a[MT][2], b[NT];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) a[m][h] = k < depth && p[m][h] ? load_pack<Eight>(p[m][h] + k) : Eight{};
#pragma unroll
    for (int n = 0; n < NT; n++) b[n] = k < depth && q[n] ? load_pack<Eight>(q[n] + k) : Eight{};
    change(a, k);
#pragma unroll
    for (int half = 0; half < 4; half += 2)
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const uint32_t left[4] = {a[m][0].value[half], a[m][1].value[half], a[m][0].value[half + 1],
                                  a[m][1].value[half + 1]};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const uint32_t right[2] = {b[n].value[half], b[n].value[half + 1]};
          mma<T>(acc[m][n], left, right);
        }
      }
  }
}

// The warps' shares of tile column n added up in the order of the warps: total[q * pitch + p], of 16 MT values of p and 8 of
// q. `shares` holds WARPS of these; total is the first of them. All threads of the block call it.
template <int WARPS, int MT, int NT>
OM_DEVICE void add_shares(const float (&acc)[MT][NT][4], int n, float* shares) {
  constexpr int PITCH = 16 * MT + 4, SIZE = 8 * PITCH;  // + 4: no two lanes of a warp in one bank
  sync_block();
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Place at = fragment::c(lane_id(), i);
      shares[warp_id() * SIZE + at.column * PITCH + 16 * m + at.row] = acc[m][n][i];
    }
  sync_block();
  for (int e = static_cast<int>(threadIdx.x); e < 8 * 16 * MT; e += WARPS * WARP) {
    float* at = shares + e / (16 * MT) * PITCH + e % (16 * MT);
    float sum = at[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum += at[w * SIZE];
    at[0] = sum;
  }
  sync_block();
}

// For the host: whether the rows of a matrix (dimensions 0 .. rank - 2) can be read in packs of 8, `depth` each.
inline bool rows_pack(const View& v, int dimensions, int64_t depth) {
  return v.stride[dimensions] == 1 && depth % 8 == 0 && packs(v, dimensions, 2, 16);
}

}  // namespace omnimamba
