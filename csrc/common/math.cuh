// Functions of one float.
#pragma once
#include "threads.cuh"

namespace omnimamba {

OM_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
OM_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x).
OM_DEVICE float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// ln(1 + e^x); x itself above 20, as torch has it.
OM_DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

}  // namespace omnimamba
