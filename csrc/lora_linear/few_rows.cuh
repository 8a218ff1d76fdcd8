// What the CUDA kernels of the LoRA linear layer for few rows share: how their sums become y and low.
#pragma once
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "parts.cuh"

namespace omnimamba {

constexpr int WARPS = 8, RANKS = 16, MOST_ROWS = 64;
constexpr int64_t FULL = 264;  // blocks that fill a large chip

// y[row, o] from its sum over the depth. A task that is none of the adapters' has the base alone, as -1 has.
OM_DEVICE void finish(const LoraLinearParams& p, int64_t row, int64_t o, float value, const float* low) {
  if (p.bias) value += float_at(p.bias, o);
  const int64_t task = p.task ? integer_at(p.task, row) : -1;
  if (task >= 0 && task < p.tasks) {
    float up = 0.0f;
    for (int64_t r = 0; r < p.rank; r++) up += low[task * p.rank + r] * float_at(p.lora_B, task, o, r);
    value += up;
  }
  put_float(value, p.y, row, o);
}

// low's element from its sum over the depth.
OM_DEVICE float routed(const LoraLinearParams& p, int64_t row, int64_t r, float value) {
  const auto task = static_cast<int64_t>(static_cast<uint32_t>(r) / static_cast<uint32_t>(p.rank));
  return integer_at(p.task, row) == task ? (p.dropout ? value * reciprocal(p.keep) : value) * p.scale : 0.0f;
}

// y of 16 MT outputs from `first` on and, FUSED, low, whose sums are one more tile, from the warps' shares of the depth.
// `shares` holds WARPS * 8 * (16 TILES + 4) floats, `low` MOST_ROWS * RANKS where FUSED.
template <int MT, bool FUSED, int TILES, int NT>
OM_DEVICE void finish_rows(const LoraLinearParams& p, const float (&acc)[TILES][NT][4], int64_t first, float* shares,
                           float* low) {
  static_assert(TILES == MT + FUSED);
  constexpr int PITCH = 16 * TILES + 4;
  [[maybe_unused]] const int64_t ranks = p.tasks * p.rank;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    add_shares<WARPS>(acc, n, shares);
    if constexpr (FUSED) {
      for (int e = static_cast<int>(threadIdx.x); e < 8 * RANKS; e += WARPS * WARP) {
        const int row = 8 * n + e / RANKS, r = e % RANKS;
        if (row >= p.rows || r >= ranks) continue;
        const float value = routed(p, row, r, shares[e / RANKS * PITCH + 16 * MT + r]);
        low[row * RANKS + r] = value;
        if (blockIdx.x == 0 && p.low) *p.low.at<float>(row, r) = value;
      }
      sync_block();
    }
    for (int e = static_cast<int>(threadIdx.x); e < 8 * 16 * MT; e += WARPS * WARP) {
      const int64_t row = 8 * n + e / (16 * MT), o = first + e % (16 * MT);
      if (row >= p.rows || o >= p.out) continue;
      const float* own = FUSED ? &low[row * RANKS] : p.low.at<float>(row);
      finish(p, row, o, shares[e / (16 * MT) * PITCH + e % (16 * MT)], own);
    }
  }
}

// Whether few_rows_int8 can take these: 16-bit x, int8 weights, in packs of 16 bytes.
bool int8_packs(const LoraLinearParams& p);
// y of up to 64 rows from int8 weights; `fused`: low comes out, from adapters of x's type and up to 16 ranks.
void few_rows_int8(const LoraLinearParams& p, bool fused);

// body(T{}) with a 16-bit type.
template <class Body>
void for_short_type(DType dtype, Body&& body) {
  if (dtype == DType::BF16)
    body(bf16{});
  else
    body(f16{});
}

}  // namespace omnimamba
