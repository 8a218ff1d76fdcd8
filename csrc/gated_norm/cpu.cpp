// Gated RMSNorm, forward and backward. For each row and each group of G neighbouring values, with s = silu(z):
//
//   u = x or x s,  r = 1 / sqrt(mean(u^2) + eps),  v = u r weight + bias,  y = v s or v
//
//   dv = dy s or dy,  dn = dv weight,  du = r (dn - u r^2 mean(dn u))
//   gate after:   dx = du,    dz = dy v silu'(z)
//   gate before:  dx = du s,  dz = du x silu'(z)
//   dweight = sum over rows of dv u r,  dbias = sum over rows of dv
//
// Plan: threads over rows; a row is read twice, the second time from the cache. For dweight and dbias the rows form at most
//   256 parts, the same at every thread count; each adds up its rows, then the parts are added in order.
// Traffic: forward rows d (3 elements with z, 2 without), backward rows d (5 or 3).
#include <algorithm>

#include "../common/parallel.h"
#include "gated_norm.h"
#include "row.h"

namespace omnimamba {
namespace {

// body(T{}, gate) with the storage type and the gate's place as compile-time constants.
template <class Body>
void for_instance(const GatedNormParams& p, Body&& body) {
  for_float_type(p.x.dtype, [&](auto type) {
    if (!p.z)
      body(type, std::integral_constant<Gate, Gate::NONE>{});
    else if (p.norm_before_gate)
      body(type, std::integral_constant<Gate, Gate::AFTER>{});
    else
      body(type, std::integral_constant<Gate, Gate::BEFORE>{});
  });
}

struct Parts {
  int64_t rows, count;

  explicit Parts(const GatedNormParams& p) : rows(p.outer * p.inner) {
    count = std::clamp<int64_t>((rows + 63) / 64, 1, 256);
  }
  int64_t begin(int64_t part) const { return rows * part / count; }
};

// One row's gradients; its share of dweight and dbias is added to these.
template <Gate Where, class T>
void gradient_row(const GatedNormParams& p, int64_t i, int64_t j, float* dweight, float* dbias) {
  const T* z = Where == Gate::NONE ? nullptr : p.z.at<T>(i, j);
  const T *x = p.x.at<T>(i, j), *dy = p.dy.at<T>(i, j);
  T *dx = p.dx.at<T>(i, j), *dz = Where == Gate::NONE ? nullptr : p.dz.at<T>(i, j);
  const float *weight = p.weight.at<float>(), *bias = p.bias.at<float>();
  for (int64_t first = 0; first < p.width; first += p.group_size) {
    vf squares = {}, products = {}, square = {}, product = {};
    auto add = [&](int64_t k, int n) {
      const int64_t c = first + k;
      vf u = load_some(x + c, n), dn = load_some(dy + c, n) * load_some(weight + c, n);
      if (Where == Gate::BEFORE) u = u * silu(load_some(z + c, n));
      if (Where == Gate::AFTER) dn = dn * silu(load_some(z + c, n));
      square = square + u * u;
      product = product + dn * u;
    };
    for_blocks(p.group_size, add, [&] {
      squares = squares + square;
      products = products + product;
      square = product = vf{};
    });
    const float size = static_cast<float>(p.group_size);
    const float r1 = 1.0f / std::sqrt(sum(squares) / size + p.eps);
    const vf r = splat(r1), slope = splat(r1 * r1 * (sum(products) / size));
    for_vectors(p.group_size, [&](int64_t k, int n) {
      const int64_t c = first + k;
      const vf in = load_some(x + c, n), g = load_some(dy + c, n), w = load_some(weight + c, n);
      vf sigma = {}, gate = splat(1.0f), gate_slope = {};
      if (Where != Gate::NONE) {
        const vf zc = load_some(z + c, n);
        sigma = sigmoid(zc);
        gate = zc * sigma;
        gate_slope = sigma * (splat(1.0f) + zc * (splat(1.0f) - sigma));
      }
      const vf u = Where == Gate::BEFORE ? in * gate : in, normed = u * r;
      const vf dv = Where == Gate::AFTER ? g * gate : g;
      const vf du = r * (dv * w - u * slope);
      store_some(dx + c, Where == Gate::BEFORE ? du * gate : du, n);
      if (Where == Gate::BEFORE) store_some(dz + c, du * in * gate_slope, n);
      if (Where == Gate::AFTER) {
        const vf v = bias ? normed * w + load_some(bias + c, n) : normed * w;
        store_some(dz + c, g * v * gate_slope, n);
      }
      store_some(dweight + c, load_some(dweight + c, n) + dv * normed, n);
      store_some(dbias + c, load_some(dbias + c, n) + dv, n);
    });
  }
}

// x += update, in storage type T.
template <class T>
void add_row(const T* update, int64_t d, T* x) {
  for_vectors(d, [&](int64_t i, int n) { store_some(x + i, load_some(x + i, n) + load_some(update + i, n), n); });
}

}  // namespace

void gated_norm_forward(const GatedNormParams& p) {
  for_instance(p, [&](auto type, auto gate) {
    using T = decltype(type);
    const int threads = p.outer * p.inner * p.width < (1 << 14) ? 1 : p.threads;
    parallel_for(threads, p.outer * p.inner, [&](int64_t row, int) {
      const int64_t i = row / p.inner, j = row % p.inner;
      const T* z = p.z ? p.z.at<T>(i, j) : nullptr;
      if (p.update) add_row(p.update.at<T>(i, j), p.width, p.x.at<T>(i, j));
      norm_row<gate.value>(p.x.at<T>(i, j), z, p.weight.at<float>(), p.bias.at<float>(), p.y.at<T>(i, j), p.width,
                           p.group_size, p.eps);
    });
  });
}

int64_t gated_norm_workspace(const GatedNormParams& p) { return Parts(p).count * 2 * p.width; }

void gated_norm_backward(const GatedNormParams& p) {
  const Parts parts(p);
  const int64_t d = p.width;
  float* sums = p.workspace.at<float>();  // (parts, 2, d): dweight and dbias of each part
  for_instance(p, [&](auto type, auto gate) {
    parallel_for(p.threads, parts.count, [&](int64_t part, int) {
      float *dweight = sums + part * 2 * d, *dbias = dweight + d;
      std::fill(dweight, dweight + 2 * d, 0.0f);
      for (int64_t row = parts.begin(part); row < parts.begin(part + 1); row++)
        gradient_row<gate.value, decltype(type)>(p, row / p.inner, row % p.inner, dweight, dbias);
    });
  });
  parallel_for(p.threads, d, [&](int64_t c, int) {
    double dweight = 0.0, dbias = 0.0;
    for (int64_t part = 0; part < parts.count; part++) {
      dweight += static_cast<double>(sums[part * 2 * d + c]);
      dbias += static_cast<double>(sums[part * 2 * d + d + c]);
    }
    *p.dweight.at<float>(c) = static_cast<float>(dweight);
    *p.dbias.at<float>(c) = static_cast<float>(dbias);
  });
}

}  // namespace omnimamba
