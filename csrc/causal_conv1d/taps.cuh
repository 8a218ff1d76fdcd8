// What the convolution's CUDA kernels share: which inputs of a position count, and where they lie.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "../common/check.h"
#include "../common/memory.cuh"
#include "causal_conv1d.h"

namespace omnimamba {

// The sequences of the last N positions. Without seq_idx all are sequence 0.
template <int N>
struct Sequences {
  int64_t id[N];  // [j]: of the position j steps back

  // Those before time t.
  OM_DEVICE void start(const CausalConv1dParams& p, int64_t b, int64_t t) {
#pragma unroll
    for (int j = 0; j < N; j++) id[j] = at(p, b, t - 1 - j);
  }
  OM_DEVICE void step(const CausalConv1dParams& p, int64_t b, int64_t t) {
#pragma unroll
    for (int j = N - 1; j > 0; j--) id[j] = id[j - 1];
    id[0] = at(p, b, t);
  }
  // Whether the input j steps back counts for the newest position; padding has none.
  OM_DEVICE bool live(int j) const { return id[0] >= 0 && id[j] == id[0]; }

  // What comes before the first position belongs to its sequence.
  OM_DEVICE static int64_t at(const CausalConv1dParams& p, int64_t b, int64_t t) {
    if (t < 0) t = 0;
    return p.seq_idx && t < p.length ? integer_at(p.seq_idx, b, t) : 0;
  }
};

// Neighbouring channels c .. c + N - 1 at time t of `sequence`, before it of `states` (b, d, width - 1), or zeros.
template <class T, int N>
OM_DEVICE void read_input(float (&out)[N], const View& sequence, const View& states, int64_t b, int64_t c, int64_t t,
                          int width) {
  if (t >= 0) {
    load_floats(out, sequence.at<T>(b, c, t));
  } else if (states) {
    load_floats(out, states.at<T>(b, c, t + width - 1));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = 0.0f;
  }
}

// For the host: whether N neighbours of every row, along the dimension of unit stride, can be read in one access.
inline bool packs_fit(const CausalConv1dParams& p, int n, std::initializer_list<const View*> views) {
  const int64_t element = p.x.dtype == DType::F32 ? 4 : 2;
  const bool channel_last = p.x.stride[1] == 1;
  bool fits =
      !channel_last || (p.channels % n == 0 && packs(p.weight, 1, 4, n < 4 ? 4 * n : 16) && packs(p.bias, 0, 4, 16));
  for (const View* each : views) {
    if (!channel_last && each == &p.initial_states) continue;  // read one by one
    View v = *each;
    v.stride[1] = v.stride[channel_last ? 2 : 1];
    fits = fits && packs(v, 2, element, n * element);
  }
  return fits;
}

// body(width) with the width as a compile-time constant.
template <class Body>
void for_width(int64_t width, Body&& body) {
  switch (width) {
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    default: check(false, "weight: the width must be 2, 3 or 4");
  }
}

// body(T{}, width, activation) with x's storage type and the compile-time flags of one kernel.
template <class Body>
void for_taps(const CausalConv1dParams& p, Body&& body) {
  for_float_type(p.x.dtype, [&](auto type) {
    for_width(p.width, [&](auto width) {
      if (p.activation)
        body(type, width, std::true_type{});
      else
        body(type, width, std::false_type{});
    });
  });
}

}  // namespace omnimamba
