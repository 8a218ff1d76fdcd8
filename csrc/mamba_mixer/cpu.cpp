#include <algorithm>
#include <cmath>

#include "causal_conv1d/row.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "mamba_mixer/mamba_mixer.h"

namespace omnimamba {
namespace {

using Params = MambaMixerStepParams;

constexpr int64_t ENOUGH = 1 << 14;  // elements below which waking threads costs more than it saves

// Where the parts of a row of zxbcdt and of the workspace begin.
struct Layout {
  int64_t dim, channels, z, xbc, dt;
  float *input, *mixed, *y, *weight,
      *bias;  // workspace: before and after the convolution, the scan's output, the filter

  explicit Layout(const Params& p) {
    dim = p.heads * p.headdim;
    channels = dim + 2 * p.groups * p.state;
    z = 2 * p.extra;
    xbc = z + dim;
    dt = xbc + channels;
    input = p.workspace.at<float>();
    mixed = input + p.batch * channels;
    y = mixed + p.batch * channels;
    weight = y + p.batch * dim;
    bias = weight + channels * p.width;
  }
};

int64_t slot_of(const Params& p, int64_t b) { return p.state_batch_indices ? integer_at(p.state_batch_indices, b) : b; }

float float_at(const View& v, int64_t i, int64_t j = 0) {
  float value = 0;
  for_float_type(v.dtype, [&](auto type) { value = to_float(*v.at<decltype(type)>(i, j)); });
  return value;
}

// Up to W values along dimension 1 of v, from (i, j) on.
OM_INLINE vf row_part(const View& v, int64_t i, int64_t j, int n) {
  vf value = {};
  for_float_type(v.dtype, [&](auto type) { value = gather(v.at<decltype(type)>(i, j), v.stride[1], n); });
  return value;
}

// ---- 1. convolution ----

View floats(float* data, int64_t stride0, int64_t stride1) {
  View v;
  v.data = data;
  v.stride[0] = stride0;
  v.stride[1] = stride1;
  return v;
}

// The filter and the inputs of n channels as floats in the workspace.
void unpack(const Params& p, const Layout& at, int64_t c, int n) {
  for (int64_t k = 0; k < p.width; k++)
    for_float_type(p.conv1d_weight.dtype, [&](auto type) {
      const View& w = p.conv1d_weight;
      store_some(at.weight + k * at.channels + c, gather(w.at<decltype(type)>(c, k), w.stride[0], n), n);
    });
  if (p.conv1d_bias)
    for_float_type(p.conv1d_bias.dtype, [&](auto type) {
      store_some(at.bias + c, gather(p.conv1d_bias.at<decltype(type)>(c), p.conv1d_bias.stride[0], n), n);
    });
  for (int64_t b = 0; b < p.batch; b++)
    store_some(at.input + b * at.channels + c, row_part(p.zxbcdt, b, at.xbc + c, n), n);
}

void convolve(const Params& p, const Layout& at) {
  CausalConv1dUpdateParams conv;
  conv.x = floats(at.input, at.channels, 1);
  conv.y = floats(at.mixed, at.channels, 1);
  conv.conv_state = p.conv_state;
  conv.weight = floats(at.weight, 1, at.channels);
  if (p.conv1d_bias) conv.bias = floats(at.bias, 1, 0);
  conv.batch = p.batch, conv.channels = at.channels, conv.length = 1, conv.width = p.width;
  conv.state_len = p.state_len, conv.activation = p.activation;
  for_float_type(p.conv_state.dtype, [&](auto state) {
    for_conv_width(p.width, [&](auto width) {
      const int threads = p.batch * at.channels < ENOUGH ? 1 : p.threads;
      parallel_for(threads, (at.channels + W - 1) / W, [&](int64_t block, int) {
        const int64_t c = block * W;
        const int n = static_cast<int>(std::min<int64_t>(W, at.channels - c));
        unpack(p, at, c, n);
        for (int64_t b = 0; b < p.batch; b++)
          if (int64_t slot = slot_of(p, b); slot >= 0)
            conv_update_row<float, decltype(state), float, width.value>(conv, b, slot, c, n);
      });
    });
  });
}

// ---- 2. the state ----

// One channel: s = decay s + gain B over its n states, in place; returns the sum of s C.
template <class S>
OM_INLINE float update_channel(S* s, int64_t step, float decay, float gain, const float* B, const float* C, int64_t n) {
  vf total = {};
  auto part = [&](int64_t i, int count) {
    vf next = splat(decay) * gather(s + i * step, step, count) + splat(gain) * load_some(B + i, count);
    scatter(s + i * step, step, next, count);
    total += next * load_some(C + i, count);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) part(i, W);
  if (i < n) part(i, static_cast<int>(n - i));
  return sum(total);
}

template <class S>
void update_head(const Params& p, const Layout& at, int64_t b, int64_t h) {
  float* y = at.y + b * at.dim + h * p.headdim;
  const int64_t slot = slot_of(p, b);
  if (slot < 0) return;
  const float* mixed = at.mixed + b * at.channels;
  const float* x = mixed + h * p.headdim;
  const float* B = mixed + at.dim + h / (p.heads / p.groups) * p.state;
  const float* C = B + p.groups * p.state;
  float dt = float_at(p.zxbcdt, b, at.dt + h);
  if (p.dt_bias) dt += float_at(p.dt_bias, h);
  dt = one([](vf v) { return softplus(v); }, dt);
  const float decay = one([](vf v) { return vexp(v); }, dt * float_at(p.A, h));
  for (int64_t i = 0; i < p.headdim; i++) {
    S* s = p.ssm_state.at<S>(slot, h, i);
    const int64_t step = p.ssm_state.stride[3];
    // A constant step lets the compiler drop the gathers.
    y[i] = step == 1 ? update_channel(s, 1, decay, dt * x[i], B, C, p.state)
                     : update_channel(s, step, decay, dt * x[i], B, C, p.state);
    if (p.D) y[i] += float_at(p.D, h, p.headwise_D ? 0 : i) * x[i];
  }
}

// ---- 3. gate and norm ----

// body(first column, how many) over `count` columns, a vector at a time.
template <class Body>
OM_INLINE void by_vectors(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + W <= count; i += W) body(i, W);
  if (i < count) body(i, static_cast<int>(count - i));
}

// Columns [begin, begin + count) of row b, one group of the norm: from y in the workspace to out.
template <class X>
void finish_group(const Params& p, const Layout& at, int64_t b, int64_t begin, int64_t count) {
  float* y = at.y + b * at.dim + begin;
  X* out = p.out.at<X>(b, p.extra + begin);
  const X* z = p.zxbcdt.at<X>(b, at.z + begin);
  const int64_t z_step = p.zxbcdt.stride[1], out_step = p.out.stride[1];
  if (slot_of(p, b) < 0) {
    by_vectors(count, [&](int64_t i, int n) { scatter(out + i * out_step, out_step, vf{}, n); });
    return;
  }
  auto gate = [&](int64_t i, int n) { return silu(gather(z + i * z_step, z_step, n)); };
  if (!p.rmsnorm_weight) {
    by_vectors(count,
               [&](int64_t i, int n) { scatter(out + i * out_step, out_step, load_some(y + i, n) * gate(i, n), n); });
    return;
  }
  vf squares = {};
  by_vectors(count, [&](int64_t i, int n) {
    vf u = load_some(y + i, n);
    if (!p.norm_before_gate) store_some(y + i, u = u * gate(i, n), n);
    squares += u * u;
  });
  const vf scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + p.eps));
  for_float_type(p.rmsnorm_weight.dtype, [&](auto type) {
    const auto* weight = p.rmsnorm_weight.at<decltype(type)>(begin);
    const int64_t step = p.rmsnorm_weight.stride[0];
    by_vectors(count, [&](int64_t i, int n) {
      vf u = load_some(y + i, n) * scale * gather(weight + i * step, step, n);
      scatter(out + i * out_step, out_step, p.norm_before_gate ? u * gate(i, n) : u, n);
    });
  });
}

// silu(z0) x0: the columns beside the scan.
template <class X>
void pass_by(const Params& p, int64_t b) {
  const int64_t step = p.zxbcdt.stride[1], out_step = p.out.stride[1];
  const X* z0 = p.zxbcdt.at<X>(b);
  const X* x0 = p.zxbcdt.at<X>(b, p.extra);
  X* out = p.out.at<X>(b);
  by_vectors(p.extra, [&](int64_t i, int n) {
    vf gated = silu(gather(z0 + i * step, step, n)) * gather(x0 + i * step, step, n);
    scatter(out + i * out_step, out_step, gated, n);
  });
}

template <class X>
void finish(const Params& p, const Layout& at) {
  const int64_t group = at.dim / p.groups;
  const int threads = p.batch * at.dim < ENOUGH ? 1 : p.threads;
  parallel_for(threads, p.batch * p.groups, [&](int64_t item, int) {
    const int64_t b = item / p.groups, g = item % p.groups;
    if (g == 0 && p.extra) pass_by<X>(p, b);
    finish_group<X>(p, at, b, g * group, group);
  });
}

}  // namespace

void mamba_mixer_step(const MambaMixerStepParams& p) {
  const Layout at(p);
  convolve(p, at);
  for_float_type(p.ssm_state.dtype, [&](auto state) {
    const int threads = p.batch * at.dim * p.state < ENOUGH ? 1 : p.threads;
    parallel_for(threads, p.batch * p.heads,
                 [&](int64_t item, int) { update_head<decltype(state)>(p, at, item / p.heads, item % p.heads); });
  });
  for_float_type(p.zxbcdt.dtype, [&](auto type) { finish<decltype(type)>(p, at); });
}

}  // namespace omnimamba
