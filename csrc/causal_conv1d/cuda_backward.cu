// Depthwise causal convolution, backward.
//
//   a[t]    = bias + sum_j weight[w - 1 - j] x[t - j]                the pre-activation, computed again
//   g[t]    = dy[t] act'(a[t])
//   dx[u]   = sum_j weight[w - 1 - j] g[u + j]                      u < 0: gradients of the initial states
//   dweight[w - 1 - j] = sum_{b, t} g[t] x[t - j]     dbias = sum_{b, t} g[t]
//
// A step j that leaves t's sequence is left out of all three; padding has g = 0.
//
// Plan, channels one element apart: a thread has N neighbouring channels of a part of the tiles (TIMES positions of a batch
//   row), at most 512 parts, and walks them with x, the unfinished dx and its sums in registers. A tile's dx needs the g of
//   w - 1 positions more, which are computed again. A second launch adds the parts' sums in order.
// Plan, times one element apart: a block has a channel and walks its times in chunks of THREADS, g in shared memory.
// Traffic: 2 b d l elements read, b d l written, and (w - 1) / TIMES of the reads again, from the cache.
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/reduce.cuh"
#include "../common/sum_parts.cuh"
#include "taps.cuh"

namespace omnimamba {
namespace {

constexpr int THREADS = 128, TIMES = 64, MOST_PARTS = 512;

int64_t tiles_of(const CausalConv1dParams& p) {
  const int64_t tiles = p.batch * ceil_div(p.length, TIMES);
  check(tiles < (int64_t{1} << 32), "x: the CUDA kernels take fewer than 2^32 tiles of 64 positions; split the batch");
  return tiles;
}
int64_t parts_of(const CausalConv1dParams& p) { return tiles_of(p) < MOST_PARTS ? tiles_of(p) : MOST_PARTS; }

// dx of time u, of the initial states before 0.
template <class T, int W, int N>
OM_DEVICE void write_dx(const CausalConv1dParams& p, const float (&dx)[N], int64_t b, int64_t c, int64_t u) {
  if (u >= 0)
    store_floats(p.dx.at<T>(b, c, u), dx);
  else if (p.dinitial_states)
    store_floats(p.dinitial_states.at<T>(b, c, u + W - 1), dx);
}

template <class T, int W, bool SILU, int N>
__global__ void __launch_bounds__(THREADS, 3)
    conv_backward_channel_last_kernel(const __grid_constant__ CausalConv1dParams p, int parts) {
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N, part = blockIdx.x;
  if (c >= p.channels) return;
  const auto tiles = static_cast<uint32_t>(ceil_div(p.length, TIMES)), all = static_cast<uint32_t>(p.batch) * tiles;
  const int index = static_cast<int>(part);
  float weight[W][N], bias[N] = {}, sums[W + 1][N] = {};  // [j]: j steps back; [W]: dbias
#pragma unroll
  for (int j = 0; j < W; j++) load_floats(weight[j], p.weight.at<float>(W - 1 - j, c));
  if (p.bias) load_floats(bias, p.bias.at<float>(c));
  for (uint32_t tile = first_of_part(all, index, parts); tile < first_of_part(all, index + 1, parts); tile++) {
    const int64_t b = tile / tiles, first = static_cast<int64_t>(tile % tiles) * TIMES;
    const int64_t end = first + TIMES < p.length ? first + TIMES : p.length;
    float x[W][N], dx[W][N] = {};
#pragma unroll
    for (int j = 0; j < W - 1; j++) read_input<T>(x[j], p.x, p.initial_states, b, c, first - 1 - j, W);
    Sequences<W> sequences;
    sequences.start(p, b, first);
    for (int64_t t = first; t < end + W - 1; t++) {
      sequences.step(p, b, t);
      float dy[N] = {}, newest[N] = {};
      if (t < p.length) {
        load_floats(newest, p.x.at<T>(b, c, t));
        load_floats(dy, p.dy.at<T>(b, c, t));
      }
      const bool counts = t < p.length && sequences.live(0);
#pragma unroll
      for (int k = 0; k < N; k++) {
#pragma unroll
        for (int j = W - 1; j > 0; j--) x[j][k] = x[j - 1][k], dx[j][k] = dx[j - 1][k];
        x[0][k] = newest[k];
        dx[0][k] = 0.0f;
        float g = counts ? dy[k] : 0.0f;
        if constexpr (SILU) {
          float a = bias[k];
#pragma unroll
          for (int j = W - 1; j >= 0; j--) a += sequences.live(j) ? weight[j][k] * x[j][k] : 0.0f;
          g = counts ? g * silu_slope(a) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < W; j++) {
          if (!counts || !sequences.live(j)) continue;
          dx[j][k] += weight[j][k] * g;
          if (t < end) sums[j][k] += g * x[j][k];
        }
        if (t < end) sums[W][k] += g;
      }
      const int64_t u = t - (W - 1);
      if (u >= (first ? first : -(W - 1))) write_dx<T, W>(p, dx[W - 1], b, c, u);
    }
  }
#pragma unroll
  for (int j = 0; j < W; j++)
    store_floats(p.workspace.at<float>() + (part * (W + 1) + W - 1 - j) * p.channels + c, sums[j]);
  store_floats(p.workspace.at<float>() + (part * (W + 1) + W) * p.channels + c, sums[W]);
}

template <class T, int W, bool SILU>
__global__ void __launch_bounds__(THREADS, 3)
    conv_backward_time_last_kernel(const __grid_constant__ CausalConv1dParams p) {
  OM_SHARED(float, g, THREADS + W - 1);
  OM_SHARED(float, scratch, THREADS / WARP * (W + 1));
  const int64_t c = blockIdx.x;
  const int me = static_cast<int>(threadIdx.x);
  float weight[W], sums[W + 1] = {};
#pragma unroll
  for (int j = 0; j < W; j++) weight[j] = *p.weight.at<float>(W - 1 - j, c);
  const float bias = p.bias ? *p.bias.at<float>(c) : 0.0f;
  // g of time t into g[slot], and for the chunk's own times its share of the sums.
  auto slope = [&](int64_t b, int64_t t, int slot, bool own) {
    Sequences<W> sequences;
    sequences.start(p, b, t);
    sequences.step(p, b, t);
    float value = 0.0f, x[W] = {};
    if (t < p.length && sequences.live(0)) {
      float a = bias;
#pragma unroll
      for (int j = W - 1; j >= 0; j--) {
        float one[1] = {};
        if (sequences.live(j)) read_input<T>(one, p.x, p.initial_states, b, c, t - j, W);
        x[j] = one[0];
        a += weight[j] * x[j];
      }
      value = to_float(*p.dy.at<T>(b, c, t));
      if constexpr (SILU) value *= silu_slope(a);
    }
    g[slot] = value;
    if (!own) return;
#pragma unroll
    for (int j = 0; j < W; j++) sums[j] += value * x[j];
    sums[W] += value;
  };
  // dx of time u from g, which begins with time `first`.
  auto gather = [&](int64_t b, int64_t first, int64_t u) {
    float dx[1] = {};
#pragma unroll
    for (int j = 0; j < W; j++) {
      const int64_t id = Sequences<W>::at(p, b, u + j);
      if (u + j >= first && u + j < p.length && id >= 0 && id == Sequences<W>::at(p, b, u))
        dx[0] += weight[j] * g[u + j - first];
    }
    write_dx<T, W>(p, dx, b, c, u);
  };
  for (int64_t b = 0; b < p.batch; b++)
    for (int64_t first = 0; first < p.length; first += THREADS) {
      slope(b, first + me, me, true);
      if (me < W - 1) slope(b, first + THREADS + me, THREADS + me, false);
      sync_block();
      if (first + me < p.length) gather(b, first, first + me);
      if (first == 0 && me < W - 1) gather(b, 0, me - (W - 1));
      sync_block();
    }
  block_sum(sums, scratch);
  if (me != 0) return;
#pragma unroll
  for (int j = 0; j < W; j++) *p.dweight.at<float>(W - 1 - j, c) = sums[j];
  *p.dbias.at<float>(c) = sums[W];
}

template <class T, int W, bool SILU, int N>
void channel_last(const CausalConv1dParams& p) {
  const auto parts = static_cast<int>(parts_of(p));
  const int threads = warps_for(p.channels / N, THREADS);
  launch<conv_backward_channel_last_kernel<T, W, SILU, N>>(
      {grid(parts, ceil_div(p.channels / N, threads)), threads, p.stream}, p, parts);
  sum_parts(p.workspace.at<float>(), parts, (W + 1) * p.channels, W * p.channels, p.dweight.at<float>(),
            p.dbias.at<float>(), p.stream);
}

}  // namespace

#if !defined(__CUDACC_RTC__)

int64_t causal_conv1d_workspace(const CausalConv1dParams& p) {
  return p.x.stride[1] == 1 ? parts_of(p) * (p.width + 1) * p.channels : 0;
}

void causal_conv1d_backward(const CausalConv1dParams& p) {
  for_taps(p, [&](auto type, auto width, auto activation) {
    using T = decltype(type);
    constexpr int W = width.value, wide = 4;
    constexpr bool SILU = activation.value;
    if (p.x.stride[1] != 1)
      launch<conv_backward_time_last_kernel<T, W, SILU>>({grid(p.channels), THREADS, p.stream}, p);
    else if (packs_fit(p, wide, {&p.x, &p.dy, &p.dx, &p.initial_states, &p.dinitial_states}))
      channel_last<T, W, SILU, wide>(p);
    else
      channel_last<T, W, SILU, 1>(p);
  });
}

#endif

}  // namespace omnimamba
