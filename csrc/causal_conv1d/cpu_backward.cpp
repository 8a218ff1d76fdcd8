// Depthwise causal convolution, backward.
//
//   a[t]    = bias + sum_j weight[w - 1 - j] x[t - j]                the pre-activation, computed again
//   g[t]    = dy[t] act'(a[t])
//   dx[u]   = sum_j weight[w - 1 - j] g[u + j]                      u < 0: gradients of the initial states
//   dweight[w - 1 - j] = sum_{b, t} g[t] x[t - j]     dbias = sum_{b, t} g[t]
//
// A step j whose bit in live[b, t] is not set is left out of all three; a row of no bits is padding and has g = 0.
//
// Plan, channels one element apart: a thread owns channels and walks their times in groups of 4 rows, each group from the
//   first channel to the last, so that memory is read in rows. The w - 1 unfinished rows of dx and the sums lie in the
//   workspace between groups. Plan, times one element apart: a thread owns channels, in pieces of 256 times through float
//   buffers.
// The sums over b and t are float within 64 rows or 256 times of a channel, double across them, always in the same order.
// Traffic: 2 b d l elements read, b d l written: one pass.
#include <algorithm>

#include "../common/parallel.h"
#include "layout.h"

namespace omnimamba {
namespace {

constexpr int ROWS = 4;    // rows in a group
constexpr int FLUSH = 64;  // rows after which float sums go into double ones: whole groups

// The workspace, by rows of d: what lies between two groups of rows.
struct Between {
  double* totals;  // (w + 1): dweight, then dbias, up to the last flush
  float* sums;     // (w + 1): the same since then
  float* pending;  // (w - 1): the unfinished dx of the rows 1 .. w - 1 steps before the next

  explicit Between(const CausalConv1dParams& p) {
    totals = p.workspace.at<double>();
    sums = reinterpret_cast<float*>(totals + (p.width + 1) * p.channels);
    pending = sums + (p.width + 1) * p.channels;
  }
};

// Rows first .. first + count - 1 of batch row b, for the channels c .. c + n - 1. dx is written at the end: rows of x that lie
// a multiple of 4 KiB from a row being written would wait for it.
template <class T, int N, bool Silu, bool Masked>
OM_INLINE void group(const CausalConv1dParams& p, const Between& w, int64_t b, int64_t first, int count, int64_t c,
                     int n) {
  const int64_t d = p.channels;
  vf weight[N], x[N] = {}, dx[N], sums[N + 1], finished[ROWS];  // index j: j steps back
  for (int j = 0; j < N; j++) {
    weight[j] = load_some(p.weight.at<float>(N - 1 - j, c), n);
    sums[j] = load_some(w.sums + j * d + c, n);
  }
  sums[N] = load_some(w.sums + N * d + c, n);
  const vf bias = p.bias ? load_some(p.bias.at<float>(c), n) : vf{};
  for (int j = 0; j < N - 1; j++) {
    const T* row = input_row<const T>(p.x, p.initial_states, b, first - 1 - j, N);
    if (row) x[j] = load_some(row + c, n);
    dx[j] = load_some(w.pending + j * d + c, n);
  }
  for (int i = 0; i < count; i++) {
    const int64_t t = first + i;
    for (int j = N - 1; j > 0; j--) x[j] = x[j - 1], dx[j] = dx[j - 1];
    x[0] = load_some(p.x.at<T>(b, c, t), n);
    dx[0] = vf{};
    const int bits = Masked ? *p.live.at<int32_t>(b, t) : -1;
    if (bits) {
      vf g = load_some(p.dy.at<T>(b, c, t), n);
      if (Silu) {
        vf a = bias;
        for (int j = N - 1; j >= 0; j--)
          if (bits >> j & 1) a = a + weight[j] * x[j];
        g = g * silu_slope(a);
      }
      for (int j = 0; j < N; j++) {
        if (!(bits >> j & 1)) continue;
        dx[j] = dx[j] + weight[j] * g;
        sums[j] = sums[j] + g * x[j];
      }
      sums[N] = sums[N] + g;
    }
    finished[i] = dx[N - 1];
  }
  for (int i = 0; i < count; i++) {
    T* row = input_row<T>(p.dx, p.dinitial_states, b, first + i - (N - 1), N);
    if (row) store_some(row + c, finished[i], n);
  }
  for (int j = 0; j <= N; j++) store_some(w.sums + j * d + c, sums[j], n);
  for (int j = 0; j < N - 1; j++) store_some(w.pending + j * d + c, dx[j], n);
}

// Channels begin .. end - 1 of batch row b.
template <class T, int N, bool Silu, bool Masked>
void walk(const CausalConv1dParams& p, const Between& w, int64_t b, int64_t begin, int64_t end) {
  const int64_t d = p.channels, l = p.length;
  auto clear = [&](float* rows, int count) {
    for (int j = 0; j < count; j++) std::fill(rows + j * d + begin, rows + j * d + end, 0.0f);
  };
  clear(w.pending, N - 1);
  for (int64_t t = 0; t < l; t += ROWS) {
    if (t % FLUSH == 0) clear(w.sums, N + 1);
    const int64_t last = t + ROWS < l ? t + ROWS : l;
    int64_t c = begin;
    if (last == t + ROWS)
      for (; c + W <= end; c += W) group<T, N, Silu, Masked>(p, w, b, t, ROWS, c, W);
    for (; c < end; c += W)
      group<T, N, Silu, Masked>(p, w, b, t, static_cast<int>(last - t), c, end - c < W ? static_cast<int>(end - c) : W);
    if (last % FLUSH != 0 && last != l) continue;
    for (int j = 0; j <= N; j++)
      for (int64_t i = j * d + begin; i < j * d + end; i++) w.totals[i] += static_cast<double>(w.sums[i]);
  }
  for (int j = 0; j < N - 1; j++) {
    T* row = input_row<T>(p.dx, p.dinitial_states, b, l - 1 - j, N);
    for (int64_t c = begin; row && c < end; c++) row[c] = from_float<T>(w.pending[j * d + c]);
  }
}

template <class T, int N, bool Silu>
void channel_last(const CausalConv1dParams& p) {
  const int64_t d = p.channels;
  const Between w(p);
  parallel_parts(p.threads, (d + W - 1) / W, [&](int64_t first, int64_t last, int) {
    const int64_t begin = first * W, end = last * W < d ? last * W : d;
    for (int j = 0; j <= N; j++) std::fill(w.totals + j * d + begin, w.totals + j * d + end, 0.0);
    for (int64_t b = 0; b < p.batch; b++) {
      if (p.live)
        walk<T, N, Silu, true>(p, w, b, begin, end);
      else
        walk<T, N, Silu, false>(p, w, b, begin, end);
    }
    for (int64_t c = begin; c < end; c++) {
      for (int j = 0; j < N; j++) *p.dweight.at<float>(N - 1 - j, c) = static_cast<float>(w.totals[j * d + c]);
      *p.dbias.at<float>(c) = static_cast<float>(w.totals[N * d + c]);
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

int64_t causal_conv1d_workspace(const CausalConv1dParams& p) { return (4 * p.width + 2) * p.channels; }

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
