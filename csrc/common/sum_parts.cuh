// Adds up what blocks have summed each for itself: the second half of a sum over the whole grid, in a fixed order.
//
//   out[c] = sum_p parts[p, c], columns c < split going to `first`, the others to `second`
//
// Plan: a block has 32 columns in 8 slices of the parts; a thread adds up its slice in double, then the slices are added in order.
// Traffic: parts * columns floats read.
#pragma once
#include "launch.h"
#include "memory.cuh"

namespace omnimamba {

// Where part `part` of `parts` begins when they share out `count` as evenly as whole numbers allow.
OM_HOST_DEVICE constexpr uint32_t first_of_part(uint32_t count, int part, int parts) {
  const uint32_t n = static_cast<uint32_t>(parts), i = static_cast<uint32_t>(part), rest = count % n;
  return i * (count / n) + (i < rest ? i : rest);
}

template <int SLICES>
__global__ void __launch_bounds__(WARP* SLICES)
    sum_parts_kernel(const float* parts, int count, int64_t columns, int64_t split, float* first, float* second) {
  OM_SHARED(double, sums, SLICES* WARP);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * WARP + lane_id();
  double sum = 0.0;
  if (c < columns) {
    const int begin = count * warp_id() / SLICES, end = count * (warp_id() + 1) / SLICES;
#pragma unroll 4
    for (int p = begin; p < end; p++) sum += static_cast<double>(parts[p * columns + c]);
  }
  sums[warp_id() * WARP + lane_id()] = sum;
  sync_block();
  if (warp_id() != 0 || c >= columns) return;
  for (int s = 1; s < SLICES; s++) sum += sums[s * WARP + lane_id()];
  (c < split ? first[c] : second[c - split]) = static_cast<float>(sum);
}

#if !defined(__CUDACC_RTC__)
inline void sum_parts(const float* parts, int count, int64_t columns, int64_t split, float* first, float* second,
                      uint64_t stream) {
  constexpr int SLICES = 8;
  launch<sum_parts_kernel<SLICES>>({grid(ceil_div(columns, WARP)), WARP * SLICES, stream}, parts, count, columns, split,
                                   first, second);
}
#endif

}  // namespace omnimamba
