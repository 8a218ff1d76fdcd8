// Depthwise causal convolution, backward.
//
//   a[t]    = bias + sum_j weight[w - 1 - j] x[t - j]                the pre-activation, computed again
//   g[t]    = dy[t] act'(a[t])
//   dx[u]   = sum_j weight[w - 1 - j] g[u + j]                      u < 0: gradients of the initial states
//   dweight[w - 1 - j] = sum_{b, t} g[t] x[t - j]     dbias = sum_{b, t} g[t]
//
// A step j whose bit in live[b, t] is not set is left out of all three; a row of no bits is padding and has g = 0.
//
// Plan, channels one element apart: a thread owns channels and walks their times in tiles of 64 rows, a vector of channels
//   at a time, with the last w inputs and the w unfinished rows of dx in registers; g of the w - 1 rows after a tile is
//   computed twice. Plan, times one element apart: a thread owns channels, in pieces of 256 times through float buffers.
// The sums over b and t are float within a tile, double across tiles, always in the same order.
// Traffic: 2 b d l elements read, b d l written: one pass.
#include <algorithm>

#include "../common/parallel.h"
#include "layout.h"

namespace omnimamba {
namespace {

constexpr int TILE = 64;   // rows in a tile
constexpr int AHEAD = 12;  // rows fetched ahead of their use

struct Tile {
  int64_t b, first, last;  // gradients of rows first .. last - 1; first < 0 begins with the initial states
  int64_t c;               // of channels c .. c + n - 1
};

// The walk of one vector of channels through the rows of one tile.
template <class T, int N, bool Silu, bool Masked>
struct Walk {
  const CausalConv1dParams& p;
  const Tile tile;
  const int n;
  vf weight[N], bias = {};   // weight[j] meets the input j steps back
  vf x[N] = {}, dx[N] = {};  // inputs j steps back, and their unfinished gradients
  vf dweight[N] = {}, dbias = {};

  OM_INLINE Walk(const CausalConv1dParams& params, const Tile& where, int lanes) : p(params), tile(where), n(lanes) {
    for (int j = 0; j < N; j++) weight[j] = load_some(p.weight.at<float>(N - 1 - j) + tile.c, n);
    if (p.bias) bias = load_some(p.bias.at<float>() + tile.c, n);
    const int64_t start = tile.first < 0 ? 0 : tile.first;
    for (int j = 1; j < N; j++) {
      const T* row = input_row<const T>(p.x, p.initial_states, tile.b, start - j, N);
      if (row) x[j - 1] = load_some(row + tile.c, n);
    }
  }

  OM_INLINE void shift() {
    for (int j = N - 1; j > 0; j--) x[j] = x[j - 1], dx[j] = dx[j - 1];
    dx[0] = vf{};
  }

  // Row t < length. Counted: t belongs to this tile, so its part of dweight and dbias does too.
  template <bool Counted>
  OM_INLINE void row(int64_t t) {
    const T* here = p.x.at<T>(tile.b, 0, t) + tile.c;
    const T* dy = p.dy.at<T>(tile.b, 0, t) + tile.c;
    if (t + AHEAD < p.length) {
      __builtin_prefetch(here + AHEAD * p.x.stride[2]);
      __builtin_prefetch(dy + AHEAD * p.dy.stride[2]);
    }
    shift();
    x[0] = load_some(here, n);
    const int bits = Masked ? *p.live.at<int32_t>(tile.b, t) : -1;
    if (Masked && !bits) return;
    vf g = load_some(dy, n);
    if (Silu) {
      vf a = bias;
      for (int j = N - 1; j >= 0; j--)
        if (bits >> j & 1) a = a + weight[j] * x[j];
      g = g * silu_slope(a);
    }
    for (int j = 0; j < N; j++) {
      if (!(bits >> j & 1)) continue;
      dx[j] = dx[j] + weight[j] * g;
      if (Counted) dweight[j] = dweight[j] + g * x[j];
    }
    if (Counted) dbias = dbias + g;
  }

  // The gradient that row t finished: that of the row N - 1 earlier.
  OM_INLINE void finish(int64_t t) {
    const int64_t u = t - (N - 1);
    if (u >= tile.first) store_some(input_row<T>(p.dx, p.dinitial_states, tile.b, u, N) + tile.c, dx[N - 1], n);
  }

  OM_INLINE void run(double* totals) {
    int64_t t = tile.first < 0 ? 0 : tile.first;
    for (; t < tile.last; t++) row<true>(t), finish(t);
    for (; t < tile.last + N - 1; t++) {
      if (t < p.length)
        row<false>(t);
      else
        shift();
      finish(t);
    }
    for (int j = 0; j < N; j++) add(totals + (N - 1 - j) * p.channels, dweight[j]);
    add(totals + N * p.channels, dbias);
  }

  OM_INLINE void add(double* totals, vf sums) {
    float lane[W];
    store(lane, sums);
    for (int i = 0; i < n; i++) totals[tile.c + i] += static_cast<double>(lane[i]);
  }
};

template <class T, int N, bool Silu, bool Masked>
void walk_channels(const CausalConv1dParams& p, int64_t begin, int64_t end, double* totals) {
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t t = 0; t < p.length; t += TILE) {
      const int64_t first = t == 0 && p.dinitial_states ? -(N - 1) : t;
      const int64_t last = t + TILE < p.length ? t + TILE : p.length;
      int64_t c = begin;
      for (; c + W <= end; c += W) Walk<T, N, Silu, Masked>(p, {b, first, last, c}, W).run(totals);
      if (c < end) Walk<T, N, Silu, Masked>(p, {b, first, last, c}, static_cast<int>(end - c)).run(totals);
    }
  }
}

template <class T, int N, bool Silu>
void channel_last(const CausalConv1dParams& p) {
  const int64_t d = p.channels;
  double* totals = p.workspace.at<double>();  // (w, d) of dweight, then (d,) of dbias
  parallel_parts(p.threads, (d + W - 1) / W, [&](int64_t first, int64_t last, int) {
    const int64_t begin = first * W, end = last * W < d ? last * W : d;
    for (int k = 0; k <= N; k++) std::fill(totals + k * d + begin, totals + k * d + end, 0.0);
    if (p.live)
      walk_channels<T, N, Silu, true>(p, begin, end, totals);
    else
      walk_channels<T, N, Silu, false>(p, begin, end, totals);
    for (int64_t c = begin; c < end; c++) {
      for (int k = 0; k < N; k++) *p.dweight.at<float>(k, c) = static_cast<float>(totals[k * d + c]);
      *p.dbias.at<float>(c) = static_cast<float>(totals[N * d + c]);
    }
  });
}

// One channel of one batch row, where its times lie side by side.
template <class T, int N, bool Silu>
struct Channel {
  const CausalConv1dParams& p;
  const int64_t b, c;
  vf tap[N], bias;                        // tap[k] meets the input N - 1 - k steps back
  float x[PIECE + 2 * (N - 1) + W] = {};  // from N - 1 times before the piece to N - 1 after it
  float g[PIECE + 2 * W] = {};
  int32_t bits[PIECE + N - 1 + 2 * W] = {};

  Channel(const CausalConv1dParams& params, int64_t row, int64_t channel) : p(params), b(row), c(channel) {
    for (int k = 0; k < N; k++) tap[k] = splat(*p.weight.template at<float>(k, c));
    bias = splat(p.bias ? *p.bias.template at<float>(c) : 0.0f);
  }

  // Times t .. t + count - 1; totals (N + 1) take their part of dweight and dbias.
  void piece(int64_t t, int count, double* totals) {
    const int known = static_cast<int>(p.length - t < count + N - 1 ? p.length - t : count + N - 1);
    read_piece<T, N>(p, b, c, t - (N - 1), known + N - 1, x);
    const int32_t* live = p.live ? p.live.template at<int32_t>(b, t) : nullptr;
    for (int i = 0; i < known; i++) bits[i] = live ? live[i] : -1;
    for (int i = known; i < count + N - 1 + W; i++) bits[i] = 0;
    outputs(p.dy.template at<T>(b, c) + t, count, known, totals);
    inputs(p.dx.template at<T>(b, c) + t, count);
    if (t == 0 && p.dinitial_states) initial_states();
  }

  void outputs(const T* dy, int count, int known, double* totals) {
    vf sums[N + 1] = {};
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int i = 0; i < known; i += W) {
      const vi here = load_bits(bits + i, W);
      vf v = load_some(dy + i, known - i < W ? known - i : W);
      if (Silu) v = v * silu_slope(taps<N>(x + i, tap, bias, here));
      v = select(here != 0, v, vf{});
      store(g + i, v);
      const vf counted = select(lane < count - i, v, vf{});
      for (int k = 0; k < N; k++)
        sums[k] = sums[k] + select((here & (1 << (N - 1 - k))) != 0, counted * load(x + i + k), vf{});
      sums[N] = sums[N] + counted;
    }
    store(g + (known + W - 1) / W * W, vf{});
    for (int k = 0; k <= N; k++) totals[k] += static_cast<double>(sum(sums[k]));
  }

  void inputs(T* dx, int count) {
    for (int i = 0; i < count; i += W) {
      vf v = {};
      for (int j = 0; j < N; j++) {
        const vi here = load_bits(bits + i + j, W);
        v = v + tap[N - 1 - j] * select((here & (1 << j)) != 0, load(g + i + j), vf{});
      }
      store_some(dx + i, v, count - i < W ? count - i : W);
    }
  }

  void initial_states() {
    for (int u = -(N - 1); u < 0; u++) {
      float v = 0.0f;
      for (int j = -u; j < N; j++)
        if (bits[u + j] >> j & 1) v += tap[N - 1 - j][0] * g[u + j];
      *p.dinitial_states.template at<T>(b, c, u + N - 1) = from_float<T>(v);
    }
  }
};

template <class T, int N, bool Silu>
void time_last(const CausalConv1dParams& p) {
  parallel_for(p.threads, p.channels, [&](int64_t c, int) {
    double totals[N + 1] = {};
    for (int64_t b = 0; b < p.batch; b++) {
      Channel<T, N, Silu> channel(p, b, c);
      for (int64_t t = 0; t < p.length; t += PIECE)
        channel.piece(t, static_cast<int>(p.length - t < PIECE ? p.length - t : PIECE), totals);
    }
    for (int k = 0; k < N; k++) *p.dweight.at<float>(k, c) = static_cast<float>(totals[k]);
    *p.dbias.at<float>(c) = static_cast<float>(totals[N]);
  });
}

}  // namespace

int64_t causal_conv1d_workspace(const CausalConv1dParams& p) { return 2 * (p.width + 1) * p.channels; }

void causal_conv1d_backward(const CausalConv1dParams& p) {
  for_instance(p, [&](auto type, auto width, auto activation) {
    using T = decltype(type);
    if (p.x.stride[1] == 1)
      channel_last<T, width.value, activation.value>(p);
    else
      time_last<T, width.value, activation.value>(p);
  });
}

}  // namespace omnimamba
