// The gated RMSNorm: what the host tells its kernels.
#pragma once
#include "../common/types.h"

namespace omnimamba {

// rows = all leading dimensions of x in two: row (i, j), i < outer, j < inner. T is x's storage type.
struct GatedNormParams {
  View x;       // (outer, inner, d) of T, the last dimension contiguous
  View z;       // as x; optional
  View weight;  // (d,) float, contiguous
  View bias;    // (d,) float, contiguous; optional
  View update;  // as x; optional: x += update in place, before all else
  View y;       // (outer, inner, d) of T, the last dimension contiguous

  View dy;         // as x
  View dx;         // as y
  View dz;         // as y; absent without z
  View dweight;    // (d,) float, contiguous
  View dbias;      // (d,) float, contiguous
  View workspace;  // gated_norm_workspace() floats

  int64_t outer = 0, inner = 0, width = 0, group_size = 0;
  float eps = 0.0f;
  bool norm_before_gate = false;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void gated_norm_forward(const GatedNormParams& p);
void gated_norm_backward(const GatedNormParams& p);
int64_t gated_norm_workspace(const GatedNormParams& p);

}  // namespace omnimamba
