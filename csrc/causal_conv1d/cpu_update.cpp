// Decode: the convolution continued from a state, and the states of packed sequences.
//
//   in  = [state, x]        y[t] = act(bias + sum_k weight[:, k] in[t + state_len - (w - 1) + k])        state = the last of in
//
// With cache_seqlens the state is a ring whose oldest entry is cache_seqlens % state_len.
//
// Plan: vectors of channels, each with its own times; threads over batch and channels where there is enough to do.
// Traffic: b d (2 l + 2 state_len) elements and the weights.
#include "../common/parallel.h"
#include "row.h"

namespace omnimamba {
namespace {

constexpr int64_t ENOUGH = 1 << 14;  // outputs below which waking threads costs more than it saves

constexpr int MOST_TAPS = 4;
constexpr int HELD = 16;  // times whose inputs are held at once

// conv_update_row with the few taps as a loop: a width known to the compiler would be two more instances of all that
// gathers and scatters, for each pair of types, and here these take the time.
template <class X, class S>
OM_INLINE void update_row(const CausalConv1dUpdateParams& p, int64_t b, int64_t slot, int64_t c, int n) {
  const int64_t before = p.width - 1, oldest = oldest_of(p, b);  // before: inputs that an output looks back at
  vf tap[MOST_TAPS], in[MOST_TAPS - 1 + HELD];
#pragma GCC unroll 1
  for (int64_t k = 0; k <= before; k++) tap[k] = gather(p.weight.at<float>(c, k), p.weight.stride[0], n);
#pragma GCC unroll 1
  for (int64_t k = 0; k < before; k++)
    in[k] = gather(state_at<S>(p, slot, c, oldest, p.state_len - before + k), p.conv_state.stride[1], n);
  const vf bias = p.bias ? gather(p.bias.at<float>(c), p.bias.stride[0], n) : vf{};
  for (int64_t t = 0; t < p.length; t++) {
    const int64_t at = t % HELD;
    if (at == 0 && t > 0)
      for (int64_t k = 0; k < before; k++) in[k] = in[HELD + k];
    in[at + before] = gather(p.x.at<X>(b, c, t), p.x.stride[1], n);
    vf a = bias;
#pragma GCC unroll 1
    for (int64_t k = 0; k <= before; k++) a = a + tap[k] * in[at + k];
    scatter(p.y.at<X>(b, c, t), p.y.stride[1], p.activation ? silu(a) : a, n);
  }
  take_in<X, S>(p, b, slot, oldest, c, n);
}

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
    } else if (n == W) {
      update_row<X, S>(p, b, slot, c, W);
    } else {
      update_row<X, S>(p, b, slot, c, n);
    }
  });
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  check(p.width >= 2 && p.width <= MOST_TAPS, "weight: the width must be 2, 3 or 4");
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
