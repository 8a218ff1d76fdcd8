// Up to W neighbouring rows of one head's state, for the decode kernels.
#pragma once
#include "../common/lanes.h"
#include "state_update.h"

namespace omnimamba {

// One row of n states: state = decay state + input B, with decay = exp(rate A), or rate itself where A is null.
// Returns the sum of state C.
template <class S, class T>
OM_INLINE float advance_row(const StateUpdateParams& p, S* state, const T* B, const T* C, const float* A, float rate,
                            float input) {
  const int64_t ss = p.state.stride[3], bs = p.B.stride[2], cs = p.C.stride[2], as = p.A.stride[2];
  vf out = {};
  auto step = [&](int64_t k, int n) {
    const vf decay = A ? vexp(splat(rate) * gather(A + k * as, as, n)) : splat(rate);
    const vf v = decay * gather(state + k * ss, ss, n) + splat(input) * gather(B + k * bs, bs, n);
    out = out + v * gather(C + k * cs, cs, n);
    scatter(state + k * ss, ss, v, n);
  };
  int64_t k = 0;
  for (; k + W <= p.n; k += W) step(k, W);
  if (k < p.n) step(k, static_cast<int>(p.n - k));
  return sum(out);
}

// Rows c .. c + rows - 1 (rows <= W) of head h, batch row b, state row `slot`: the states in place, and out.
template <class S, class T, class Out>
OM_INLINE void advance_rows(const StateUpdateParams& p, int64_t b, int64_t slot, int64_t h, int64_t c, int rows) {
  const int64_t group = h / (p.heads / p.groups);
  const vf x = gather(p.x.at<T>(b, h, c), p.x.stride[2], rows);
  vf dt = gather(p.dt.at<float>(b, h, c), p.dt.stride[2], rows);
  if (p.dt_bias) dt = dt + gather(p.dt_bias.at<float>(h, c), p.dt_bias.stride[1], rows);
  if (p.dt_softplus) dt = softplus(dt);
  const bool tied = p.A.stride[2] == 0 || p.n == 1;
  float rate[W], input[W], out[W] = {};
  store(rate, tied ? vexp(dt * gather(p.A.at<float>(h, c), p.A.stride[1], rows)) : dt);
  store(input, dt * x);
  for (int i = 0; i < rows; i++)
    out[i] = advance_row(p, p.state.at<S>(slot, h, c + i), p.B.at<T>(b, group), p.C.at<T>(b, group),
                         tied ? nullptr : p.A.at<float>(h, c + i), rate[i], input[i]);
  vf y = load(out);
  if (p.D) y = y + x * gather(p.D.at<float>(h, c), p.D.stride[1], rows);
  if (p.z) y = y * silu(gather(p.z.at<T>(b, h, c), p.z.stride[2], rows));
  scatter(p.out.at<Out>(b, h, c), p.out.stride[2], y, rows);
}

}  // namespace omnimamba
