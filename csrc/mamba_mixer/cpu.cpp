#include <algorithm>

#include "causal_conv1d/row.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "gated_norm/row.h"
#include "mamba_mixer/mamba_mixer.h"
#include "state_update/row.h"

namespace omnimamba {
namespace {

using Params = MambaMixerStepParams;

constexpr int64_t ENOUGH = 1 << 14;  // elements below which waking threads costs more than it saves
constexpr int64_t FILTERED =
    16;  // elements that a convolved one, with its filter and state apart in memory, counts for

int threads_for(const Params& p, int64_t elements) { return elements < ENOUGH ? 1 : p.threads; }

int64_t slot_of(const Params& p, int64_t b) { return p.state_batch_indices ? integer_at(p.state_batch_indices, b) : b; }

// Where the parts of a row of zxbcdt begin, and those of the workspace.
struct Layout {
  int64_t dim, channels, z, xbc, dt;
  float *input, *mixed, *y, *filter,
      *bias;  // convolution before and after, the scan's output, the convolution's weights
  float *steps, *A, *dt_bias, *D, *norm_weight;  // the small ones

  explicit Layout(const Params& p) {
    dim = p.heads * p.headdim;
    channels = dim + 2 * p.groups * p.state;
    z = 2 * p.extra;
    xbc = z + dim;
    dt = xbc + channels;
    float* next = p.workspace.at<float>();
    auto take = [&](int64_t count) { return next += count, next - count; };
    input = take(p.batch * channels);
    mixed = take(p.batch * channels);
    y = take(p.batch * dim);
    filter = take(p.width * channels);
    bias = take(channels);
    steps = take(p.batch * p.heads);
    A = take(p.heads);
    dt_bias = take(p.heads);
    D = take(dim);
    norm_weight = take(dim);
  }
};

View floats(float* data, int64_t stride0, int64_t stride1 = 0, int64_t stride2 = 0) {
  View v;
  v.data = data;
  v.stride[0] = stride0;
  v.stride[1] = stride1;
  v.stride[2] = stride2;
  return v;
}

// to[i] = from[i * step] as floats, from the element of v that `from` names.
void unpack(const View& v, int64_t row, int64_t column, int axis, int64_t count, float* to) {
  for_float_type(v.dtype, [&](auto type) {
    const auto* from = v.at<decltype(type)>(row, column);
    const int64_t step = v.stride[axis];
    for_vectors(count, [&](int64_t i, int n) { store_some(to + i, gather(from + i * step, step, n), n); });
  });
}

void unpack_small(const Params& p, const Layout& at) {
  for (int64_t b = 0; b < p.batch; b++) unpack(p.zxbcdt, b, at.dt, 1, p.heads, at.steps + b * p.heads);
  unpack(p.A, 0, 0, 0, p.heads, at.A);
  if (p.dt_bias) unpack(p.dt_bias, 0, 0, 0, p.heads, at.dt_bias);
  if (p.D && p.headwise_D) unpack(p.D, 0, 0, 0, p.heads, at.D);
  if (p.D && !p.headwise_D)
    for (int64_t h = 0; h < p.heads; h++) unpack(p.D, h, 0, 1, p.headdim, at.D + h * p.headdim);
  if (p.rmsnorm_weight) unpack(p.rmsnorm_weight, 0, 0, 0, at.dim, at.norm_weight);
}

// ---- 1. convolution ----

void convolve(const Params& p, const Layout& at) {
  CausalConv1dUpdateParams conv;
  conv.x = floats(at.input, at.channels, 1);
  conv.y = floats(at.mixed, at.channels, 1);
  conv.conv_state = p.conv_state;
  conv.weight = floats(at.filter, 1, at.channels);
  if (p.conv1d_bias) conv.bias = floats(at.bias, 1);
  conv.batch = p.batch, conv.channels = at.channels, conv.length = 1, conv.width = p.width;
  conv.state_len = p.state_len, conv.activation = p.activation;
  check(p.width >= 2 && p.width <= kMostTaps, "conv1d_weight: the width must be 2, 3 or 4");
  for_float_type(p.conv_state.dtype, [&](auto state) {
    parallel_for(threads_for(p, FILTERED * p.batch * at.channels), (at.channels + W - 1) / W, [&](int64_t block, int) {
      const int64_t c = block * W;
      const int n = static_cast<int>(std::min<int64_t>(W, at.channels - c));
      for (int64_t k = 0; k < p.width; k++) unpack(p.conv1d_weight, c, k, 0, n, at.filter + k * at.channels + c);
      if (p.conv1d_bias) unpack(p.conv1d_bias, c, 0, 0, n, at.bias + c);
      for (int64_t b = 0; b < p.batch; b++) {
        const int64_t slot = slot_of(p, b);
        if (slot < 0) continue;
        unpack(p.zxbcdt, b, at.xbc + c, 1, n, at.input + b * at.channels + c);
        conv_update_row<float, decltype(state), float>(conv, b, slot, c, n);
      }
    });
  });
}

// ---- 2. the state ----

void scan(const Params& p, const Layout& at) {
  StateUpdateParams step;
  float* B = at.mixed + at.dim;
  step.state = p.ssm_state;
  step.x = floats(at.mixed, at.channels, p.headdim, 1);
  step.B = floats(B, at.channels, p.state, 1);
  step.C = floats(B + p.groups * p.state, at.channels, p.state, 1);
  step.out = floats(at.y, at.dim, p.headdim, 1);
  step.dt = floats(at.steps, p.heads, 1);
  step.A = floats(at.A, 1);  // one rate a head: strides 0 over its channels and states
  if (p.dt_bias) step.dt_bias = floats(at.dt_bias, 1);
  if (p.D) step.D = p.headwise_D ? floats(at.D, 1) : floats(at.D, p.headdim, 1);
  step.batch = p.batch, step.heads = p.heads, step.groups = p.groups, step.n = p.state;
  step.dt_softplus = true;
  for_float_type(p.ssm_state.dtype, [&](auto state) {
    parallel_for(threads_for(p, p.batch * at.dim * p.state), p.batch * p.heads, [&](int64_t item, int) {
      const int64_t b = item / p.heads, h = item % p.heads, slot = slot_of(p, b);
      if (slot < 0) return;
      for_vectors(p.headdim,
                  [&](int64_t c, int rows) { advance_rows<decltype(state), float, float>(step, b, slot, h, c, rows); });
    });
  });
}

// ---- 3. gate and norm ----

template <class X>
void finish_row(const Params& p, const Layout& at, int64_t b) {
  X* out = p.out.at<X>(b);
  if (slot_of(p, b) < 0) {
    std::fill(out, out + p.extra + at.dim, X{});
    return;
  }
  const int64_t step = p.zxbcdt.stride[1];
  for_vectors(p.extra, [&](int64_t i, int n) {
    const vf z0 = gather(p.zxbcdt.at<X>(b, i), step, n), x0 = gather(p.zxbcdt.at<X>(b, p.extra + i), step, n);
    store_some(out + i, silu(z0) * x0, n);
  });
  out += p.extra;
  float *y = at.y + b * at.dim, *z = at.input + b * at.channels;  // the convolution's input is used up
  unpack(p.zxbcdt, b, at.z, 1, at.dim, z);
  const int64_t group = at.dim / p.groups;
  if (!p.rmsnorm_weight)
    for_vectors(at.dim,
                [&](int64_t i, int n) { store_some(out + i, load_some(y + i, n) * silu(load_some(z + i, n)), n); });
  else if (p.norm_before_gate)
    norm_row<Gate::AFTER>(y, z, at.norm_weight, static_cast<float*>(nullptr), out, at.dim, group, p.eps);
  else
    norm_row<Gate::BEFORE>(y, z, at.norm_weight, static_cast<float*>(nullptr), out, at.dim, group, p.eps);
}

}  // namespace

void mamba_mixer_step(const MambaMixerStepParams& p) {
  const Layout at(p);
  unpack_small(p, at);
  convolve(p, at);
  scan(p, at);
  for_float_type(p.zxbcdt.dtype, [&](auto type) {
    parallel_for(threads_for(p, p.batch * at.dim), p.batch,
                 [&](int64_t b, int) { finish_row<decltype(type)>(p, at, b); });
  });
}

}  // namespace omnimamba
