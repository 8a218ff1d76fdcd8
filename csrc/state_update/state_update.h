// One decode step of the selective scan: what the host tells its kernel.
#pragma once
#include "../common/types.h"

namespace omnimamba {

// b batch, h heads, d head width, g groups, n state. S is the state's storage type, T that of x, B, C, z and out.
struct StateUpdateParams {
  View state;                // (slots, h, d, n) of S, any strides, updated in place
  View x;                    // (b, h, d) of T, any strides
  View dt;                   // (b, h, d) float, any strides
  View A;                    // (h, d, n) float, any strides; stride 0 along n: one exponential serves a whole row
  View B;                    // (b, g, n) of T, any strides
  View C;                    // (b, g, n) of T, any strides
  View D;                    // (h, d) float, any strides; optional
  View z;                    // (b, h, d) of T, any strides; optional
  View dt_bias;              // (h, d) float, any strides; optional
  View state_batch_indices;  // (b,) integers, negative: padding (on the GPU past the last too); optional
  View out;                  // (b, h, d) of T, any strides
  int64_t batch = 0, slots = 0, heads = 0, width = 0, groups = 1, n = 0;
  bool dt_softplus = false;
  int threads = 1;      // of the processor
  uint64_t stream = 0;  // of the GPU
};

void state_update_forward(const StateUpdateParams& p);

}  // namespace omnimamba
