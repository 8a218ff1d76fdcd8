// Depthwise causal convolution, forward.
//
//   y[b, c, t] = act(bias[c] + sum_j weight[w - 1 - j, c] x[b, c, t - j])        j = 0 .. w - 1 steps back
//
// Inputs before t = 0 are the initial states, or zero. With seq_idx a step that leaves t's sequence does not count, and the y
// of padding is 0.
//
// Plan, channels one element apart: a thread has N neighbouring channels and walks TIMES positions with the last w - 1 inputs
//   in registers; it starts AHEAD reads together. Neighbouring threads have neighbouring channels.
// Plan, times one element apart: a thread has N neighbouring times of one channel.
// N elements are 16 bytes where all addresses allow it, else one element.
// Traffic: b d l elements read, as many written; every tile of TIMES reads w - 1 more, from the cache.
#include "../common/launch.h"
#include "../common/math.cuh"
#include "taps.cuh"

namespace omnimamba {
namespace {

constexpr int THREADS = 128, TIMES = 32, AHEAD = 4;

// A tile of one batch row.
template <class T, int W, bool SILU, int N>
OM_DEVICE void channel_last_tile(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t first) {
  const int64_t end = first + TIMES < p.length ? first + TIMES : p.length;
  float weight[W][N], bias[N] = {}, x[W][N];  // [j]: j steps back
#pragma unroll
  for (int j = 0; j < W; j++) load_floats(weight[j], p.weight.at<float>(W - 1 - j, c));
  if (p.bias) load_floats(bias, p.bias.at<float>(c));
#pragma unroll
  for (int j = 0; j < W - 1; j++) read_input<T>(x[j], p.x, p.initial_states, b, c, first - 1 - j, W);
  Sequences<W> sequences;
  sequences.start(p, b, first);
  for (int64_t t = first; t < end; t += AHEAD) {
    Pack<T, N> next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (t + i < end) next[i] = load_pack<Pack<T, N>>(p.x.at<T>(b, c, t + i));
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (t + i >= end) break;
      sequences.step(p, b, t + i);
      float y[N];
#pragma unroll
      for (int k = 0; k < N; k++) {
#pragma unroll
        for (int j = W - 1; j > 0; j--) x[j][k] = x[j - 1][k];
        x[0][k] = to_float(next[i].value[k]);
        float a = bias[k];
#pragma unroll
        for (int j = W - 1; j >= 0; j--) a += sequences.live(j) ? weight[j][k] * x[j][k] : 0.0f;
        y[k] = !sequences.live(0) ? 0.0f : SILU ? silu(a) : a;
      }
      store_floats(p.y.at<T>(b, c, t + i), y);
    }
  }
}

template <class T, int W, bool SILU, int N>
__global__ void __launch_bounds__(THREADS, 3) conv_channel_last_kernel(const __grid_constant__ CausalConv1dParams p) {
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (c >= p.channels) return;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    channel_last_tile<T, W, SILU, N>(p, b, c, static_cast<int64_t>(blockIdx.x) * TIMES);
}

// N times of one channel.
template <class T, int W, bool SILU, int N>
OM_DEVICE void time_last_pack(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  const bool whole = t + N <= p.length;
  float x[W - 1 + N], y[N];  // from w - 1 steps before t on
#pragma unroll
  for (int i = 0; i < W - 1; i++) {
    float one[1];
    read_input<T>(one, p.x, p.initial_states, b, c, t + i - (W - 1), W);
    x[i] = one[0];
  }
  float in[N];
  if (whole) load_floats(in, p.x.at<T>(b, c, t));
#pragma unroll
  for (int i = 0; i < N; i++)
    x[W - 1 + i] = whole ? in[i] : t + i < p.length ? to_float(*p.x.at<T>(b, c, t + i)) : 0.0f;
  const float bias = p.bias ? *p.bias.at<float>(c) : 0.0f;
  float weight[W];
#pragma unroll
  for (int j = 0; j < W; j++) weight[j] = *p.weight.at<float>(W - 1 - j, c);
  Sequences<W> sequences;
  sequences.start(p, b, t);
#pragma unroll
  for (int i = 0; i < N; i++) {
    sequences.step(p, b, t + i);
    float a = bias;
#pragma unroll
    for (int j = W - 1; j >= 0; j--) a += sequences.live(j) ? weight[j] * x[W - 1 + i - j] : 0.0f;
    y[i] = !sequences.live(0) ? 0.0f : SILU ? silu(a) : a;
  }
  if (whole) {
    store_floats(p.y.at<T>(b, c, t), y);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (t + i < p.length) *p.y.at<T>(b, c, t + i) = from_float<T>(y[i]);
  }
}

template <class T, int W, bool SILU, int N>
__global__ void __launch_bounds__(THREADS, 3) conv_time_last_kernel(const __grid_constant__ CausalConv1dParams p) {
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (t >= p.length) return;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t c = blockIdx.y; c < p.channels; c += gridDim.y) time_last_pack<T, W, SILU, N>(p, b, c, t);
}

template <class T, int W, bool SILU, int N>
void run(const CausalConv1dParams& p) {
  const bool channel_last = p.x.stride[1] == 1;
  const int64_t packs = ceil_div(channel_last ? p.channels : p.length, N);
  const int threads = warps_for(packs, THREADS);
  if (channel_last)
    launch<conv_channel_last_kernel<T, W, SILU, N>>(
        {grid(ceil_div(p.length, TIMES), ceil_div(packs, threads), p.batch), threads, p.stream}, p);
  else
    launch<conv_time_last_kernel<T, W, SILU, N>>(
        {grid(ceil_div(packs, threads), p.channels, p.batch), threads, p.stream}, p);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void causal_conv1d_forward(const CausalConv1dParams& p) {
  if (p.batch == 0 || p.channels == 0 || p.length == 0) return;
  for_taps(p, [&](auto type, auto width, auto activation) {
    using T = decltype(type);
    constexpr int wide = 16 / static_cast<int>(sizeof(T));
    if (packs_fit(p, wide, {&p.x, &p.y, &p.initial_states}))
      run<T, width.value, activation.value, wide>(p);
    else
      run<T, width.value, activation.value, 1>(p);
  });
}

#endif

}  // namespace omnimamba
