// common/memory.cuh on the emulator.
#pragma once
#include <cstring>

#include "threads.h"

namespace omnimamba::host_gpu {

void copy_async(void* shared, const void* global, int bytes, bool live);
void copy_async_commit();
void copy_async_wait(int latest);

uint32_t bits_of(float a);
float float_of(uint32_t bits);
uint16_t round_to_bf16(float a);
uint16_t round_to_f16(float a);
float widen_f16(uint16_t bits);

}  // namespace omnimamba::host_gpu

namespace omnimamba {

template <class Pack, class T>
Pack load_pack(const T* p) {
  host_gpu::check_aligned(p, sizeof(Pack), "load_pack");
  return *reinterpret_cast<const Pack*>(p);
}
template <class Pack, class T>
void store_pack(T* p, const Pack& v) {
  host_gpu::check_aligned(p, sizeof(Pack), "store_pack");
  *reinterpret_cast<Pack*>(p) = v;
  host_gpu::wrote(p, sizeof(Pack));
}

inline float to_float(float a) { return a; }
inline float to_float(bf16 a) { return host_gpu::float_of(static_cast<uint32_t>(a.bits) << 16); }
inline float to_float(f16 a) { return host_gpu::widen_f16(a.bits); }

template <class T>
T from_float(float a);
template <>
inline float from_float<float>(float a) {
  return a;
}
template <>
inline bf16 from_float<bf16>(float a) {
  return {host_gpu::round_to_bf16(a)};
}
template <>
inline f16 from_float<f16>(float a) {
  return {host_gpu::round_to_f16(a)};
}

template <int BYTES>
void copy_async(void* shared, const void* global, bool live = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  host_gpu::copy_async(shared, global, BYTES, live);
}
inline void copy_async_commit() { host_gpu::copy_async_commit(); }
template <int N>
void copy_async_wait(OM_SITE) {
  if (host_gpu::left_out("copy_async_wait", file, line)) return;
  host_gpu::copy_async_wait(N);
}

}  // namespace omnimamba
