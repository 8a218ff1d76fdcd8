// One step of the convolution for a vector of channels, for the decode kernels.
#pragma once
#include "../common/lanes.h"
#include "../common/transpose.h"
#include "causal_conv1d.h"

namespace omnimamba {

constexpr int kMostTaps = 4;

// One input into a state whose channels c .. c + W - 1 lie one after another, Len values each in order: whole vectors in,
// shuffled to the channels' times, and out. Loads of single values would be most of the work.
template <class X, class S, class Y, int N, int Len>
OM_INLINE void conv_update_in_order(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t c) {
  S* state = p.conv_state.at<S>(slot, c);
  vf tap[N], in[Len + 1];
  if (p.weight.stride[0] == N && p.weight.stride[1] == 1) {
    for (int k = 0; k < N; k++) tap[k] = load(p.weight.at<float>(c) + k * W);
    Columns<N>::split(tap);
  } else {
    for (int k = 0; k < N; k++) tap[k] = gather(p.weight.at<float>(c, k), p.weight.stride[0], W);
  }
  for (int k = 0; k < Len; k++) in[k] = load(state + k * W);
  Columns<Len>::split(in);
  in[Len] = gather(p.x.at<X>(b, c), p.x.stride[1], W);
  vf a = p.bias ? gather(p.bias.at<float>(c), p.bias.stride[0], W) : vf{};
  for (int k = 0; k < N; k++) a = a + tap[k] * in[Len - (N - 1) + k];
  scatter(p.y.at<Y>(b, c), p.y.stride[1], p.activation ? silu(a) : a, W);
  Columns<Len>::join(in + 1);
  for (int k = 0; k < Len; k++) store(state + k * W, in[1 + k]);
}

// Channels c .. c + n - 1 (n <= W) of batch row b, state row `slot`: y from the state and x, then x into the state.
// X, S, Y: storage of x, the state, y.
template <class X, class S, class Y>
void conv_update_row(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t c, int n) {
  const int w = static_cast<int>(p.width);
  const int64_t l = p.length, len = p.state_len, xs = p.x.stride[1], ss = p.conv_state.stride[1];
  const bool dense = ss == len && p.conv_state.stride[2] == 1;
  if (n == W && l == 1 && !p.cache_seqlens && dense && len <= w) switch (10 * w + len) {
      case 21: return conv_update_in_order<X, S, Y, 2, 1>(p, b, slot, c);
      case 22: return conv_update_in_order<X, S, Y, 2, 2>(p, b, slot, c);
      case 32: return conv_update_in_order<X, S, Y, 3, 2>(p, b, slot, c);
      case 33: return conv_update_in_order<X, S, Y, 3, 3>(p, b, slot, c);
      case 43: return conv_update_in_order<X, S, Y, 4, 3>(p, b, slot, c);
      case 44: return conv_update_in_order<X, S, Y, 4, 4>(p, b, slot, c);
    }
  // Where the oldest input lies: the state is in order, or a ring.
  const int64_t oldest = p.cache_seqlens ? integer_at(p.cache_seqlens, b) % len : 0;
  auto place = [&](int64_t i) { return p.conv_state.at<S>(slot, c, oldest + i < len ? oldest + i : oldest + i - len); };
  vf tap[kMostTaps], in[kMostTaps];
  for (int k = 0; k < w; k++) tap[k] = gather(p.weight.at<float>(c, k), p.weight.stride[0], n);
  for (int k = 0; k < w - 1; k++) in[k] = gather(place(len - (w - 1) + k), ss, n);
  const vf bias = p.bias ? gather(p.bias.at<float>(c), p.bias.stride[0], n) : vf{};
  for (int64_t t = 0; t < l; t++) {
    in[w - 1] = gather(p.x.at<X>(b, c, t), xs, n);
    vf a = bias;
    for (int k = 0; k < w; k++) a = a + tap[k] * in[k];
    scatter(p.y.at<Y>(b, c, t), p.y.stride[1], p.activation ? silu(a) : a, n);
    for (int k = 0; k < w - 1; k++) in[k] = in[k + 1];
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

}  // namespace omnimamba
