// One row of the gated RMSNorm, for its own kernel and for the fused decode step.
#pragma once
#include <cmath>
#include <type_traits>

#include "../common/lanes.h"
#include "gate.h"

namespace omnimamba {

// body(first, n) for the vectors of `count` values: full ones with n = W known to the compiler, then the rest.
template <class Body>
OM_INLINE void for_vectors(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + W <= count; i += W) body(i, W);
  if (i < count) body(i, static_cast<int>(count - i));
}

// The same in blocks, with end() after each: sums of long rows keep their last bits when they are added up block by block.
template <class Body, class End>
OM_INLINE void for_blocks(int64_t count, Body&& body, End&& end) {
  constexpr int64_t block = 64 * W;
  for (int64_t first = 0; first < count; first += block) {
    for_vectors(count - first < block ? count - first : block, [&](int64_t i, int n) { body(first + i, n); });
    end();
  }
}

constexpr int64_t kKept = 4096;  // values of a group that are kept on the stack at most, rather than computed again

// y = norm(x) silu(z), norm(x), or norm(x silu(z)), over each group of the d values; norm(u) = u r weight + bias with
// r = 1 / sqrt(mean(u^2) + eps). z is read unless Where is NONE; bias may be null. y may be x.
template <Gate Where, class X, class Z, class Y>
void norm_row(const X* x, const Z* z, const float* weight, const float* bias, Y* y, int64_t d, int64_t group,
              float eps) {
  // x silu(z) is kept until the group's mean is known: in a float y, for a shorter type, which would round it, beside it.
  constexpr bool gated = Where == Gate::BEFORE, in_y = gated && std::is_same_v<Y, float>;
  alignas(64) float beside[gated && !in_y ? kKept : W];
  const bool kept = in_y || (gated && group <= kKept);
  for (int64_t first = 0; first < d; first += group) {
    float* u_kept = beside;
    if constexpr (in_y) u_kept = y + first;
    auto input = [&](int64_t i, int n) {
      vf u = load_some(x + first + i, n);
      return gated ? u * silu(load_some(z + first + i, n)) : u;
    };
    vf squares = {}, part = {};
    auto add = [&](int64_t i, int n) {
      const vf u = input(i, n);
      if (kept) store_some(u_kept + i, u, n);
      part = part + u * u;
    };
    for_blocks(group, add, [&] {
      squares = squares + part;
      part = vf{};
    });
    const vf r = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(group) + eps));
    for_vectors(group, [&](int64_t i, int n) {
      vf v = kept ? load_some(u_kept + i, n) : input(i, n);
      v = v * r * load_some(weight + first + i, n);
      if (bias) v = v + load_some(bias + first + i, n);
      if (Where == Gate::AFTER) v = v * silu(load_some(z + first + i, n));
      store_some(y + first + i, v, n);
    });
  }
}

}  // namespace omnimamba
