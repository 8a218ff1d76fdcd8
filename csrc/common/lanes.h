// Vectors of up to W values between memory and registers: full or partial, side by side or apart; and integers of a View.
#pragma once
#include "simd.h"

namespace omnimamba {

// With n = W known to the compiler these are a plain load and store.
template <class T>
OM_INLINE vf load_some(const T* p, int n) {
  return n == W ? load(p) : load_part(p, n);
}
template <class T>
OM_INLINE void store_some(T* p, vf v, int n) {
  if (n == W)
    store(p, v);
  else
    store_part(p, v, n);
}

// Values that lie apart are moved one by one: a call beside that costs little, and its code at every use much.
template <class T>
[[gnu::noinline]] vf gather_apart(const T* p, int64_t step, int n) {
  T lane[W] = {};
  for (int i = 0; i < n; i++) lane[i] = p[i * step];
  return load(lane);
}
template <class T>
[[gnu::noinline]] void scatter_apart(T* p, int64_t step, vf v, int n) {
  T lane[W];
  store(lane, v);
  for (int i = 0; i < n; i++) p[i * step] = lane[i];
}

// n values that lie `step` elements apart; the other lanes are 0.
template <class T>
OM_INLINE vf gather(const T* p, int64_t step, int n) {
  return step == 1 ? load_some(p, n) : gather_apart(p, step, n);
}
template <class T>
OM_INLINE void scatter(T* p, int64_t step, vf v, int n) {
  if (step == 1)
    store_some(p, v, n);
  else
    scatter_apart(p, step, v, n);
}

// Element i of a one-dimensional tensor of int32 or int64.
OM_INLINE int64_t integer_at(const View& v, int64_t i) {
  return v.dtype == DType::I64 ? *v.at<int64_t>(i) : static_cast<int64_t>(*v.at<int32_t>(i));
}

}  // namespace omnimamba
