// Memory: packs of neighbouring values in one access, conversions, and copies to shared memory that do not wait.
#pragma once
#include "threads.cuh"

#if defined(OMNIMAMBA_EMULATED)
#include "../host_gpu/memory.h"
#else

namespace omnimamba {

// N neighbouring values; p is a multiple of their size, at most 16 bytes.
template <class Pack, class T>
OM_DEVICE Pack load_pack(const T* p) {
  return *reinterpret_cast<const Pack*>(p);
}
template <class Pack, class T>
OM_DEVICE void store_pack(T* p, const Pack& v) {
  *reinterpret_cast<Pack*>(p) = v;
}

OM_DEVICE float to_float(float a) { return a; }
OM_DEVICE float to_float(bf16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
OM_DEVICE float to_float(f16 a) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(a.bits));
  return out;
}

// Rounded to nearest, ties to even.
template <class T>
OM_DEVICE T from_float(float a);
template <>
OM_DEVICE float from_float<float>(float a) {
  return a;
}
template <>
OM_DEVICE bf16 from_float<bf16>(float a) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(a));
  return out;
}
template <>
OM_DEVICE f16 from_float<f16>(float a) {
  f16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(a));
  return out;
}

// Copies BYTES (4, 8 or 16; both addresses multiples of it) from global to shared memory. The data is there once this
// thread has waited for the group, and other threads see it after a barrier that follows. Not `live`: zeros instead.
template <int BYTES>
OM_DEVICE void copy_async(void* shared, const void* global, bool live = true) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int size = live ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(size)
                 : "memory");
}

// The copies since the last commit become one group.
OM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all groups but the latest N have landed.
template <int N>
OM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace omnimamba
#endif

namespace omnimamba {

// N neighbouring values of T in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T value[N];
};

// N neighbouring values as floats, in accesses of at most 16 bytes, each a multiple of its size.
template <class T, int N>
OM_DEVICE void load_floats(float (&out)[N], const T* p) {
  constexpr int EACH = N * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : N;
#pragma unroll
  for (int i = 0; i < N; i += EACH) {
    const auto pack = load_pack<Pack<T, EACH>>(p + i);
#pragma unroll
    for (int k = 0; k < EACH; k++) out[i + k] = to_float(pack.value[k]);
  }
}

template <class T, int N>
OM_DEVICE void store_floats(T* p, const float (&v)[N]) {
  constexpr int EACH = N * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : N;
#pragma unroll
  for (int i = 0; i < N; i += EACH) {
    Pack<T, EACH> pack;
#pragma unroll
    for (int k = 0; k < EACH; k++) pack.value[k] = from_float<T>(v[i + k]);
    store_pack(p + i, pack);
  }
}

// Element i, or (i, j), of a tensor of int32 or int64.
OM_DEVICE int64_t integer_at(const View& v, int64_t i, int64_t j = 0) {
  return v.dtype == DType::I64 ? *v.at<int64_t>(i, j) : static_cast<int64_t>(*v.at<int32_t>(i, j));
}

// The row of a state that batch row b has, of `slots`: b itself without indices. Padding is negative, and so is what comes of
// an index past the last row.
OM_DEVICE int64_t slot_at(const View& indices, int64_t b, int64_t slots) {
  if (!indices) return b;
  const int64_t slot = integer_at(indices, b);
  return slot < slots ? slot : -1;
}

// Element (i, j, k) of a tensor of any float type, for operands so small that asking for the type costs nothing.
OM_DEVICE float float_at(const View& v, int64_t i, int64_t j = 0, int64_t k = 0) {
  switch (v.dtype) {
    case DType::BF16: return to_float(*v.at<bf16>(i, j, k));
    case DType::F16: return to_float(*v.at<f16>(i, j, k));
    default: return *v.at<float>(i, j, k);
  }
}
OM_DEVICE void put_float(float value, const View& v, int64_t i, int64_t j = 0, int64_t k = 0) {
  switch (v.dtype) {
    case DType::BF16: *v.at<bf16>(i, j, k) = from_float<bf16>(value); break;
    case DType::F16: *v.at<f16>(i, j, k) = from_float<f16>(value); break;
    default: *v.at<float>(i, j, k) = value;
  }
}

// For the host: whether packs of `bytes` can be read at every index of the first `dimensions` dimensions of v.
inline bool packs(const View& v, int dimensions, int64_t element, int64_t bytes) {
  if (!v) return true;
  bool fits = reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(bytes) == 0;
  for (int i = 0; i < dimensions; i++) fits = fits && v.stride[i] * element % bytes == 0;
  return fits;
}

}  // namespace omnimamba
