// Depthwise causal convolution, forward.
//
//   y[b, c, t] = act(bias[c] + sum_j weight[w - 1 - j, c] x[b, c, t - j])        j = 0 .. w - 1 steps back
//
// Inputs before t = 0 are the initial states, or zero. Where `live` is given, bit j of live[b, t] says whether step j counts;
// a row of no bits is padding, and its y is 0.
//
// Plan, channels one element apart: groups of 4 times; vectors run along the channels, so each x row is read once from
//   memory and three times more from the cache. Rows that miss a tap are done one at a time.
// Plan, times one element apart: each channel in pieces of 256 times through a float buffer that begins w - 1 inputs
//   earlier; vectors run along the time.
// Traffic: b d l elements read, as many written.
#include "../common/parallel.h"
#include "layout.h"

namespace omnimamba {
namespace {

constexpr int GROUP = 4;  // times done together

// `count` neighbouring outputs of n channels: x[i] is the input i - (N - 1) steps from the first output.
template <class T, int N, bool Silu, int Count>
OM_INLINE void outputs(const T* const* x, T* const* y, const float* weight, const float* bias, int64_t d, int64_t c,
                       int n) {
  vf in[Count + N - 1], tap[N];
  for (int i = 0; i < Count + N - 1; i++) in[i] = x[i] ? load_some(x[i] + c, n) : vf{};
  for (int k = 0; k < N; k++) tap[k] = load_some(weight + k * d + c, n);
  vf b = bias ? load_some(bias + c, n) : vf{};
  for (int i = 0; i < Count; i++) {
    vf a = b;
    for (int k = 0; k < N; k++) a = a + tap[k] * in[i + k];
    store_some(y[i] + c, Silu ? silu(a) : a, n);
  }
}

template <class T, int N, bool Silu, int Count>
void channel_last_rows(const CausalConv1dParams& p, int64_t b, int64_t t) {
  const int64_t d = p.channels;
  const float* weight = p.weight.at<float>();
  const float* bias = p.bias.at<float>();
  const T* x[Count + N - 1];
  T* y[Count];
  for (int i = 0; i < Count + N - 1; i++) x[i] = input_row<const T>(p.x, p.initial_states, b, t + i - (N - 1), N);
  for (int i = 0; i < Count; i++) y[i] = p.y.at<T>(b, 0, t + i);
  if constexpr (Count == 1) {
    const int bits = p.live ? *p.live.at<int32_t>(b, t) : -1;
    if (!bits) return clear_row(y[0], d);
    for (int j = 0; j < N; j++)
      if (!(bits >> j & 1)) x[N - 1 - j] = nullptr;
  }
  int64_t c = 0;
  for (; c + W <= d; c += W) outputs<T, N, Silu, Count>(x, y, weight, bias, d, c, W);
  if (c < d) outputs<T, N, Silu, Count>(x, y, weight, bias, d, c, static_cast<int>(d - c));
}

template <class T, int N, bool Silu>
void channel_last(const CausalConv1dParams& p) {
  const int64_t groups = (p.length + GROUP - 1) / GROUP;
  parallel_for(p.threads, p.batch * groups, [&](int64_t item, int) {
    const int64_t b = item / groups, t = item % groups * GROUP;
    if (t + GROUP <= p.length && all_live<N>(p, b, t, GROUP)) return channel_last_rows<T, N, Silu, GROUP>(p, b, t);
    for (int64_t s = t; s < p.length && s < t + GROUP; s++) channel_last_rows<T, N, Silu, 1>(p, b, s);
  });
}

template <class T, int N, bool Silu>
void time_last(const CausalConv1dParams& p) {
  parallel_for(p.threads, p.batch * p.channels, [&](int64_t item, int) {
    const int64_t b = item / p.channels, c = item % p.channels;
    float x[N - 1 + PIECE + W];
    vf tap[N];
    for (int k = 0; k < N; k++) tap[k] = splat(*p.weight.at<float>(k, c));
    const vf bias = splat(p.bias ? *p.bias.at<float>(c) : 0.0f);
    T* y = p.y.at<T>(b, c);
    for (int64_t t = 0; t < p.length; t += PIECE) {
      const int count = static_cast<int>(p.length - t < PIECE ? p.length - t : PIECE);
      read_piece<T, N>(p, b, c, t - (N - 1), count + N - 1, x);
      const int32_t* live = p.live ? p.live.at<int32_t>(b, t) : nullptr;
      for (int i = 0; i < count; i += W) {
        const int n = count - i < W ? count - i : W;
        vf a = taps<N>(x + i, tap, bias, live ? load_bits(live + i, n) : splat_int(-1));
        if (Silu) a = silu(a);
        if (live) a = select(load_bits(live + i, n) != 0, a, vf{});
        store_some(y + t + i, a, n);
      }
    }
  });
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dParams& p) {
  if (p.batch == 0 || p.channels == 0 || p.length == 0) return;
  for_instance(p, [&](auto type, auto width, auto activation) {
    using T = decltype(type);
    if (p.x.stride[1] == 1)
      channel_last<T, width.value, activation.value>(p);
    else
      time_last<T, width.value, activation.value>(p);
  });
}

}  // namespace omnimamba
