// Up to W neighbouring rows of one head's state, for the decode kernels.
#pragma once
#include "../common/lanes.h"
#include "state_update.h"

namespace omnimamba {

// R rows of n states, `pitch` apart: state = decay state + input B, with decay = exp(rate A), or rate itself where A is
// null; out is each row's sum of state C. B and C are read once for all R. Packed: all innermost strides are 1.
template <int R, bool Packed, class S, class T>
OM_INLINE void advance_rows_of(const StateUpdateParams& p, S* state, int64_t pitch, const T* B, const T* C,
                               const float* A, const float* rate, const float* input, float* out) {
  const int64_t ss = Packed ? 1 : p.state.stride[3], bs = Packed ? 1 : p.B.stride[2], cs = Packed ? 1 : p.C.stride[2];
  const int64_t as = p.A.stride[2];
  vf sums[R] = {};
  auto step = [&](int64_t k, int n) {
    const vf b = gather(B + k * bs, bs, n), c = gather(C + k * cs, cs, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      S* s = state + r * pitch + k * ss;
      if (Packed) __builtin_prefetch(s + W * pitch, 1);  // the same row of the next block
      const vf decay = A ? vexp(splat(rate[r]) * gather(A + k * as, as, n)) : splat(rate[r]);
      const vf v = decay * gather(s, ss, n) + splat(input[r]) * b;
      sums[r] = sums[r] + v * c;
      scatter(s, ss, v, n);
    }
  };
  int64_t k = 0;
  for (; k + W <= p.n; k += W) step(k, W);
  if (k < p.n) step(k, static_cast<int>(p.n - k));
  for (int r = 0; r < R; r++) out[r] = sum(sums[r]);
}

// Rows c .. c + rows - 1 (rows <= W) of head h, batch row b, state row `slot`: the states in place, and out.
template <class S, class T, class Out>
OM_INLINE void advance_rows(const StateUpdateParams& p, int64_t b, int64_t slot, int64_t h, int64_t c, int rows) {
  const int64_t group = h / (p.heads / p.groups);
  const vf x = gather(p.x.at<T>(b, h, c), p.x.stride[2], rows);
  vf dt = gather(p.dt.at<float>(b, h, c), p.dt.stride[2], rows);
  if (p.dt_bias) dt = dt + gather(p.dt_bias.at<float>(h, c), p.dt_bias.stride[1], rows);
  if (p.dt_softplus) dt = softplus(dt);
  const bool tied = (p.A.stride[2] == 0 && p.n) || p.n == 1;
  float rate[W], input[W], out[W] = {};
  store(rate, tied ? vexp(dt * gather(p.A.at<float>(h, c), p.A.stride[1], rows)) : dt);
  store(input, dt * x);
  const T *B = p.B.at<T>(b, group), *C = p.C.at<T>(b, group);
  const int64_t pitch = p.state.stride[2];
  int i = 0;
  if (tied && p.state.stride[3] == 1 && p.B.stride[2] == 1 && p.C.stride[2] == 1)
    for (; i + 4 <= rows; i += 4)
      advance_rows_of<4, true>(p, p.state.at<S>(slot, h, c + i), pitch, B, C, nullptr, rate + i, input + i, out + i);
  for (; i < rows; i++)
    advance_rows_of<1, false>(p, p.state.at<S>(slot, h, c + i), pitch, B, C, tied ? nullptr : p.A.at<float>(h, c + i),
                              rate + i, input + i, out + i);
  vf y = load(out);
  if (p.D) y = y + x * gather(p.D.at<float>(h, c), p.D.stride[1], rows);
  if (p.z) y = y * silu(gather(p.z.at<T>(b, h, c), p.z.stride[2], rows));
  scatter(p.out.at<Out>(b, h, c), p.out.stride[2], y, rows);
}

}  // namespace omnimamba
