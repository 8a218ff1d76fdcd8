// What the matrix products of the LoRA linear layer share.
#pragma once
#include "parts.cuh"

namespace omnimamba {

// The same product by the matrix units, from 16-bit operands of one type; false where they do not fit it.
bool matmul_16(const LoraMatmulParams& p);
// The same on Hopper.
bool matmul_sm90(const LoraMatmulParams& p);

// Tile `index`: 8 rows of tiles go down before the next column of them, so that the blocks alive together share strips of
// both operands in the L2 cache.
OM_DEVICE Place tile_of(uint32_t index, int64_t tiles_m, int64_t tiles_n) {
  constexpr uint32_t GROUP = 8;
  const auto m = static_cast<uint32_t>(tiles_m), n = static_cast<uint32_t>(tiles_n);
  const uint32_t first = index / (GROUP * n) * GROUP, inside = index % (GROUP * n);
  const uint32_t height = m - first < GROUP ? m - first : GROUP;
  return {static_cast<int>(first + inside % height), static_cast<int>(inside / height)};
}

}  // namespace omnimamba
