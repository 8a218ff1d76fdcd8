// Decode: the convolution continued from a state, and the states of packed sequences.
//
//   in  = [state, x]        y[t] = act(bias + sum_k weight[:, k] in[t + state_len - (w - 1) + k])        state = the last of in
//
// With cache_seqlens the state is a ring whose oldest entry is cache_seqlens % state_len.
//
// Plan: vectors of channels, each with its own times; threads over batch and channels where there is enough to do.
// Traffic: b d (2 l + 2 state_len) elements and the weights.
#include "../common/check.h"
#include "../common/parallel.h"
#include "row.h"

namespace omnimamba {
namespace {

constexpr int64_t ENOUGH = 1 << 14;  // outputs below which waking threads costs more than it saves

template <class X, class S>
void update(const CausalConv1dUpdateParams& p) {
  const int64_t d = p.channels, blocks = (d + W - 1) / W;
  const int threads = p.batch * d * p.length < ENOUGH ? 1 : p.threads;
  parallel_for(threads, p.batch * blocks, [&](int64_t item, int) {
    const int64_t b = item / blocks, c = item % blocks * W;
    const int n = d - c < W ? static_cast<int>(d - c) : W;
    const int64_t slot = p.conv_state_indices ? integer_at(p.conv_state_indices, b) : b;
    if (slot < 0) {
      for (int64_t t = 0; t < p.length; t++) scatter(p.y.at<X>(b, c, t), p.y.stride[1], vf{}, n);
    } else {
      conv_update_row<X, S, X>(p, b, slot, c, n);
    }
  });
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  check(p.width >= 2 && p.width <= kMostTaps, "weight: the width must be 2, 3 or 4");
  for_float_type(p.x.dtype, [&](auto x) {
    for_float_type(p.conv_state.dtype, [&](auto state) { update<decltype(x), decltype(state)>(p); });
  });
}

void causal_conv1d_varlen_states(const CausalConv1dVarlenParams& p) {
  for_float_type(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.threads, p.sequences, [&](int64_t s, int) {
      const int64_t start = integer_at(p.cu_seqlens, s), end = integer_at(p.cu_seqlens, s + 1);
      for (int64_t i = 0; i < p.state_len; i++) {
        const int64_t t = end - p.state_len + i;
        for (int64_t c = 0; c < p.channels; c++) *p.states.at<T>(s, c, i) = t >= start ? *p.x.at<T>(t, c) : T{};
      }
    });
  });
}

}  // namespace omnimamba
