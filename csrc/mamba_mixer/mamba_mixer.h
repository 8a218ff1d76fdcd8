// One decode step of a Mamba-2 mixer between its two projections, in one call.
//
// Maths    [z0, x0, z, xBC, dt] = zxbcdt;  [x, B, C] = act(convolution of xBC continued from conv_state);
//          dt = softplus(dt + dt_bias);  S = exp(dt A) S + dt x B^T;  y = S C + D x  for each head;
//          out = [silu(z0) x0, y silu(z)], or with a norm weight the gated RMSNorm of y over each of the g groups.
// Shapes   zxbcdt (b, 2 extra + 2 h p + 2 g n + h), conv_state (slots, h p + 2 g n, state_len), ssm_state (slots, h, p, n),
//          conv1d_weight (h p + 2 g n, w), dt_bias and A (h,), D (h,) or (h, p), rmsnorm_weight (h p,), out (b, extra + h p).
//          Any float type and any strides each (out: contiguous rows); both states change in place.
//          A negative slot, on the GPU one past the last too: output 0, states untouched.
// Plan     1. the convolution, vectors of channels; 2. the state, one head of one row at a time: it is read and written
//          once, its output summed on the way; 3. gate and norm, once all heads of a group are there. Threads share each,
//          where there is enough of it; float32 between the three.
// Traffic  2 h p n elements of ssm_state a row; the rest is small beside it.
#pragma once
#include "../common/types.h"

namespace omnimamba {

struct MambaMixerStepParams {
  View zxbcdt, conv_state, ssm_state, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight;
  View state_batch_indices;  // (b,) int32 or int64; absent: row b has slot b
  View out;
  View
      workspace;  // b (2 channels + h p + h) + channels (w + 1) + 2 (h + h p) floats, channels = h p + 2 g n; of the CUDA
                  // kernel: mamba_mixer_step_workspace() floats
  View tickets;  // (slots, h) int32, contiguous, 0 before and after; of the CUDA kernel
  int64_t batch = 0, slots = 0, heads = 0, headdim = 0, groups = 1, state = 0, extra = 0, width = 0, state_len = 0;
  float eps = 0;
  bool norm_before_gate = true, activation = true, headwise_D = true;  // headwise_D: D is (h,)
  int threads = 1;                                                     // of the processor
  uint64_t stream = 0;                                                 // of the GPU
};

void mamba_mixer_step(const MambaMixerStepParams& p);
int64_t mamba_mixer_step_workspace(const MambaMixerStepParams& p);

}  // namespace omnimamba
