// The recurrence itself for a few positions, each state vector in a register from the first position to the last.
//
//   S_t = exp(dt_t A) S_(t-1) + (dt_t x_t) B_t        y_t = (sum over n of S_t C_t + D x_t) silu(z_t)
//
// Traffic: initial and final states once each, 8 h p n bytes; nothing else counts.
#include "../common/parallel.h"
#include "prepare.h"

namespace omnimamba {
namespace ssd {
namespace {

// One head's steps and decays.
struct Steps {
  Steps(const SsdScanParams& q, int64_t b, int64_t h) {
    const float bias = q.dt_bias ? *q.dt_bias.at<float>(h) : 0.0f, A = finite_rate(*q.A.at<float>(h));
    for (int64_t t = 0; t < q.length; t++) {
      dt[t] = step_size(q, splat(*q.dt.at<float>(b, t, h) + bias))[0];
      decay[t] = one(vexp_decay, dt[t] * A);
    }
  }
  float dt[kShort], decay[kShort];
};

// Row c of a head's state, all positions; y[t] before skip and gate.
template <class T>
void scan_row(const SsdScanParams& q, const Steps& steps, int64_t b, int64_t h, int64_t c, float* y) {
  const int64_t g = h / (q.heads / q.groups);
  const int n = static_cast<int>(q.state);
  vf total[kShort] = {};
  float input[kShort];
  for (int64_t t = 0; t < q.length; t++) input[t] = steps.dt[t] * to_float(*q.x.at<T>(b, t, h, c));
  for (int i = 0; i < n; i += W) {
    vf state = q.initial_states ? load_left(q.initial_states.at<float>(b, h, c) + i, n - i) : vf{};
    for (int64_t t = 0; t < q.length; t++) {
      state = state * splat(steps.decay[t]) + splat(input[t]) * load_left(q.B.at<T>(b, t, g) + i, n - i);
      total[t] += state * load_left(q.C.at<T>(b, t, g) + i, n - i);
    }
    store_left(q.final_states.at<float>(b, h, c) + i, state, n - i);
  }
  for (int64_t t = 0; t < q.length; t++) y[t] = sum(total[t]);
}

template <class T>
void scan_head(const SsdScanParams& q, int64_t b, int64_t h) {
  const Steps steps(q, b, h);
  for (int64_t c = 0; c < q.headdim; c++) {
    float y[kShort];
    scan_row<T>(q, steps, b, h, c, y);
    for (int64_t t = 0; t < q.length; t++) {
      if (q.D) y[t] += *q.D.at<float>(h, c) * to_float(*q.x.at<T>(b, t, h, c));
      if (q.z) y[t] *= one(silu, to_float(*q.z.at<T>(b, t, h, c)));
      *q.y.at<T>(b, t, h, c) = from_float<T>(y[t]);
    }
  }
}

}  // namespace
}  // namespace ssd

void ssd_scan_short(const SsdScanParams& q) {
  check(q.length <= ssd::kShort, "ssd_scan_short: more positions than it has registers for");
  for_float_type(q.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(q.threads, q.batch * q.heads, [&](int64_t i, int) { ssd::scan_head<T>(q, i / q.heads, i % q.heads); });
  });
}

}  // namespace omnimamba
