// One step of the convolution for a vector of channels, for the decode kernels.
#pragma once
#include "../common/check.h"
#include "../common/lanes.h"
#include "causal_conv1d.h"

namespace omnimamba {

constexpr int MOST_TAPS = 4;
constexpr int HELD = 16;  // times whose inputs are held at once

// Channels c .. c + n - 1 (n <= W) of batch row b, state row `slot`: y from the state and x, then x into the state.
// X, S, Y: storage of x, the state, y. The few taps are a loop, not a compile-time width: what takes time is to gather them.
template <class X, class S, class Y>
OM_INLINE void conv_update_row(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t c, int n) {
  const int64_t l = p.length, len = p.state_len, xs = p.x.stride[1], ss = p.conv_state.stride[1];
  // Where the oldest input lies: the state is in order, or a ring.
  const int64_t oldest = p.cache_seqlens ? integer_at(p.cache_seqlens, b) % len : 0;
  auto place = [&](int64_t i) { return p.conv_state.at<S>(slot, c, oldest + i < len ? oldest + i : oldest + i - len); };
  const int64_t before = p.width - 1;  // inputs that an output looks back at
  vf tap[MOST_TAPS], in[MOST_TAPS - 1 + HELD];
#pragma GCC unroll 1
  for (int64_t k = 0; k <= before; k++) tap[k] = gather(p.weight.at<float>(c, k), p.weight.stride[0], n);
#pragma GCC unroll 1
  for (int64_t k = 0; k < before; k++) in[k] = gather(place(len - before + k), ss, n);
  const vf bias = p.bias ? gather(p.bias.at<float>(c), p.bias.stride[0], n) : vf{};
  for (int64_t t = 0; t < l; t++) {
    const int64_t at = t % HELD;
    if (at == 0 && t > 0)
      for (int64_t k = 0; k < before; k++) in[k] = in[HELD + k];
    in[at + before] = gather(p.x.at<X>(b, c, t), xs, n);
    vf a = bias;
#pragma GCC unroll 1
    for (int64_t k = 0; k <= before; k++) a = a + tap[k] * in[at + k];
    scatter(p.y.at<Y>(b, c, t), p.y.stride[1], p.activation ? silu(a) : a, n);
  }
  if (!p.cache_seqlens)
    for (int i = 0; i < n; i++) {
      S* row = p.conv_state.at<S>(slot, c + i);
      const int64_t step = p.conv_state.stride[2];
      for (int64_t k = 0; k + l < len; k++) row[k * step] = row[(k + l) * step];
    }
  for (int64_t t = l < len ? 0 : l - len; t < l; t++) {
    S* to = p.cache_seqlens ? place(t % len) : place(len - l + t);
    scatter(to, ss, gather(p.x.at<X>(b, c, t), xs, n), n);
  }
}

inline void check_width(int64_t width) {
  check(width >= 2 && width <= MOST_TAPS, "weight: the width must be 2, 3 or 4");
}

}  // namespace omnimamba
