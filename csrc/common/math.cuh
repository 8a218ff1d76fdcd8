// Functions of one float. Divisions and roots are the hardware's own, right to 2 units in the last place: the exact ones call
// subroutines, around which registers spill.
#pragma once
#include "threads.cuh"

namespace omnimamba {

#if defined(OMNIMAMBA_EMULATED)
OM_DEVICE float reciprocal(float x) { return 1.0f / x; }
OM_DEVICE float inverse_root(float x) { return 1.0f / std::sqrt(x); }
OM_DEVICE float power_of_two(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
#else
OM_DEVICE float reciprocal(float x) {
  float out;
  asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
OM_DEVICE float inverse_root(float x) { return rsqrtf(x); }
// 2^x; 0 where that is less than 2^-126.
OM_DEVICE float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
#endif

OM_DEVICE float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }
OM_DEVICE float silu(float x) { return x * sigmoid(x); }

// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x).
OM_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// ln(1 + e^x); x itself above 20, as torch has it.
OM_DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

}  // namespace omnimamba
