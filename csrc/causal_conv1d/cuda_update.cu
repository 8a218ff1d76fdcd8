// Decode: the convolution continued from a state, and the states of packed sequences.
//
//   in  = [state, x]        y[t] = act(bias + sum_k weight[:, k] in[t + state_len - (w - 1) + k])        state = the last of in
//
// With cache_seqlens the state is a ring whose oldest entry is cache_seqlens % state_len.
//
// Plan: a thread has one channel of one row and walks its times; any strides.
// Traffic: b d (2 l + 2 state_len) elements and the weights.
#include "../common/launch.h"
#include "../common/math.cuh"
#include "taps.cuh"

namespace omnimamba {
namespace {

constexpr int THREADS = 128;

// a mod b without the subroutine that 64-bit division is; b < 2^31.
OM_DEVICE uint32_t modulo(uint64_t a, uint32_t b) {
  const auto high = static_cast<uint32_t>(a >> 32), low = static_cast<uint32_t>(a);
  if (high == 0) return low % b;
  uint32_t rest = high % b;
  for (int bit = 31; bit >= 0; bit--) rest = (2 * rest + (low >> bit & 1)) % b;
  return rest;
}

template <class X, class S, int W>
OM_DEVICE void update_channel(const CausalConv1dUpdateParams& p, int64_t b, int64_t c) {
  const int64_t l = p.length, len = p.state_len;
  const int64_t slot = slot_at(p.conv_state_indices, b, p.slots);
  if (slot < 0) {
#pragma unroll 1
    for (int64_t t = 0; t < l; t++) *p.y.at<X>(b, c, t) = from_float<X>(0.0f);
    return;
  }
  const auto ring = static_cast<uint32_t>(len);
  const int64_t oldest = p.cache_seqlens ? modulo(static_cast<uint64_t>(integer_at(p.cache_seqlens, b)), ring) : 0;
  auto place = [&](int64_t i) { return p.conv_state.at<S>(slot, c, oldest + i < len ? oldest + i : oldest + i - len); };
  float weight[W], in[W];
#pragma unroll
  for (int k = 0; k < W; k++) weight[k] = *p.weight.at<float>(c, k);
#pragma unroll
  for (int k = 0; k < W - 1; k++) in[k] = to_float(*place(len - (W - 1) + k));
  const float bias = p.bias ? *p.bias.at<float>(c) : 0.0f;
#pragma unroll 1
  for (int64_t t = 0; t < l; t++) {
    in[W - 1] = to_float(*p.x.at<X>(b, c, t));
    float a = bias;
#pragma unroll
    for (int k = 0; k < W; k++) a += weight[k] * in[k];
    *p.y.at<X>(b, c, t) = from_float<X>(p.activation ? silu(a) : a);
#pragma unroll
    for (int k = 0; k < W - 1; k++) in[k] = in[k + 1];
  }
  if (!p.cache_seqlens) {
#pragma unroll 1
    for (int64_t k = 0; k + l < len; k++) *p.conv_state.at<S>(slot, c, k) = *p.conv_state.at<S>(slot, c, k + l);
  }
  const int64_t first = l < len ? 0 : l - len;  // of the times that the state keeps
  int64_t to = p.cache_seqlens ? modulo(static_cast<uint64_t>(first), ring) : len - l + first;
#pragma unroll 1
  for (int64_t t = first; t < l; t++, to = to + 1 < len ? to + 1 : 0)
    *place(to) = from_float<S>(to_float(*p.x.at<X>(b, c, t)));
}

template <class X, class S, int W>
__global__ void __launch_bounds__(THREADS, 3) conv_update_kernel(const __grid_constant__ CausalConv1dUpdateParams p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.channels) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) update_channel<X, S, W>(p, b, c);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3)
    conv_varlen_states_kernel(const __grid_constant__ CausalConv1dVarlenParams p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.channels) return;
  for (int64_t s = blockIdx.y; s < p.sequences; s += gridDim.y) {
    const int64_t start = integer_at(p.cu_seqlens, s), first = integer_at(p.cu_seqlens, s + 1) - p.state_len;
    for (int64_t i = 0; i < p.state_len; i++) {
      const int64_t t = first + i;
      const bool inside = t >= start && t >= 0 && t < p.total;
      *p.states.at<T>(s, c, i) = inside ? *p.x.at<T>(t, c) : from_float<T>(0.0f);
    }
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  if (p.batch == 0 || p.channels == 0) return;
  const int threads = warps_for(p.channels, THREADS);
  const Shape shape{grid(ceil_div(p.channels, threads), p.batch), threads, p.stream};
  for_float_type(p.x.dtype, [&](auto x) {
    for_float_type(p.conv_state.dtype, [&](auto state) {
      for_width(p.width,
                [&](auto width) { launch<conv_update_kernel<decltype(x), decltype(state), width.value>>(shape, p); });
    });
  });
}

void causal_conv1d_varlen_states(const CausalConv1dVarlenParams& p) {
  if (p.sequences == 0 || p.channels == 0) return;
  const int threads = warps_for(p.channels, THREADS);
  const Shape shape{grid(ceil_div(p.channels, threads), p.sequences), threads, p.stream};
  for_float_type(p.x.dtype, [&](auto type) { launch<conv_varlen_states_kernel<decltype(type)>>(shape, p); });
}

#endif

}  // namespace omnimamba
