// One step of the convolution for a vector of channels, for the decode kernels.
#pragma once
#include <type_traits>

#include "../common/check.h"
#include "../common/lanes.h"
#include "causal_conv1d.h"

namespace omnimamba {

// Channels c .. c + n - 1 (n <= W) of batch row b, state row `slot`: y from the state and x, then x into the state.
// X, S, Y: storage of x, the state, y. N: the width.
template <class X, class S, class Y, int N>
OM_INLINE void conv_update_row(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t c, int n) {
  const int64_t l = p.length, len = p.state_len, xs = p.x.stride[1], ss = p.conv_state.stride[1];
  // Where the oldest input lies: the state is in order, or a ring.
  const int64_t oldest = p.cache_seqlens ? integer_at(p.cache_seqlens, b) % len : 0;
  auto place = [&](int64_t i) { return p.conv_state.at<S>(slot, c, oldest + i < len ? oldest + i : oldest + i - len); };
  vf tap[N], in[N];
  for (int k = 0; k < N; k++) tap[k] = gather(p.weight.at<float>(c, k), p.weight.stride[0], n);
  for (int k = 0; k < N - 1; k++) in[k] = gather(place(len - (N - 1) + k), ss, n);
  const vf bias = p.bias ? gather(p.bias.at<float>(c), p.bias.stride[0], n) : vf{};
  for (int64_t t = 0; t < l; t++) {
    in[N - 1] = gather(p.x.at<X>(b, c, t), xs, n);
    vf a = bias;
    for (int k = 0; k < N; k++) a = a + tap[k] * in[k];
    scatter(p.y.at<Y>(b, c, t), p.y.stride[1], p.activation ? silu(a) : a, n);
    for (int k = 0; k < N - 1; k++) in[k] = in[k + 1];
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

// body(width) with the width as a compile-time constant.
template <class Body>
void for_conv_width(int64_t width, Body&& body) {
  switch (width) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    default: check(false, "weight: the width must be 2, 3 or 4");
  }
}

}  // namespace omnimamba
