// What the convolution's forward and backward share: where its inputs lie and which of them count.
#pragma once
#include <type_traits>

#include "../common/check.h"
#include "../common/lanes.h"
#include "causal_conv1d.h"

namespace omnimamba {

constexpr int PIECE = 256;  // times in a piece, where times are one element apart

OM_INLINE vi load_bits(const int32_t* p, int n) {
  vi v = {};
  std::memcpy(&v, p, sizeof(int32_t) * static_cast<size_t>(n));
  return v;
}

template <class T>
OM_INLINE void clear_row(T* row, int64_t d) {
  std::memset(static_cast<void*>(row), 0, sizeof(T) * static_cast<size_t>(d));
}

// The channels of time t: of `sequence` (b, d, l), before it of `states` (b, d, width - 1), which may be absent.
template <class T>
OM_INLINE T* input_row(const View& sequence, const View& states, int64_t b, int64_t t, int width) {
  using Stored = std::remove_const_t<T>;
  if (t >= 0) return sequence.at<Stored>(b, 0, t);
  return states ? states.at<Stored>(b, 0, t + width - 1) : nullptr;
}

// Whether every tap of `count` outputs from t on counts (an absent initial state counts as zeros).
template <int N>
OM_INLINE bool all_live(const CausalConv1dParams& p, int64_t b, int64_t t, int count) {
  if (!p.live) return true;
  const int32_t* live = p.live.at<int32_t>(b, t);
  int32_t common = -1;
  for (int i = 0; i < count; i++) common &= live[i];
  return (common & ((1 << N) - 1)) == (1 << N) - 1;
}

// Inputs first .. first + count of one channel as floats, and W zeros after them.
template <class T, int N>
OM_INLINE void read_piece(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t first, int count, float* out) {
  int i = 0;
  for (; i < count && first + i < 0; i++)
    out[i] = p.initial_states ? to_float(*p.initial_states.at<T>(b, c, first + i + N - 1)) : 0.0f;
  const T* x = p.x.at<T>(b, c) + first;
  for (; i + W <= count; i += W) store(out + i, load(x + i));
  if (i < count) store(out + i, load_part(x + i, count - i)), i = count;
  store(out + i, vf{});
}

// bias + sum_k tap[k] x[k], x starting N - 1 times before the outputs; a tap whose bit is not set is not looked at.
template <int N>
OM_INLINE vf taps(const float* x, const vf* tap, vf bias, vi bits) {
  vf a = bias;
  for (int k = 0; k < N; k++) a = a + tap[k] * select((bits & (1 << (N - 1 - k))) != 0, load(x + k), vf{});
  return a;
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

// body(T{}, width, activation) with x's storage type and the compile-time flags of one kernel.
template <class Body>
void for_instance(const CausalConv1dParams& p, Body&& body) {
  for_float_type(p.x.dtype, [&](auto type) {
    auto with_width = [&](auto width) {
      if (p.activation)
        body(type, width, std::true_type{});
      else
        body(type, width, std::false_type{});
    };
    for_conv_width(p.width, with_width);
  });
}

}  // namespace omnimamba
