// common/mma.cuh on the emulator.
#pragma once
#include "memory.h"

namespace omnimamba {
namespace host_gpu {

void load_matrices(uint32_t* out, int count, bool transposed, const void* row);
void store_matrices(void* row, bool transposed, const uint32_t (&from)[4]);
// c (16 x 8) += a (16 x k) b (k x 8).
struct Multiply {
  float* c;
  const float *a, *b;  // this lane's elements
};
void multiply(const char* name, const Multiply& mine, int k);
float clear_low_bits(float a, int bits);

}  // namespace host_gpu

template <bool TRANSPOSED, int N>
void load_matrices(uint32_t (&out)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  host_gpu::load_matrices(out, N, TRANSPOSED, row);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float wide_a[8], wide_b[4];
  for (int i = 0; i < 8; i++) wide_a[i] = to_float(T{static_cast<uint16_t>(a[i / 2] >> i % 2 * 16)});
  for (int i = 0; i < 4; i++) wide_b[i] = to_float(T{static_cast<uint16_t>(b[i / 2] >> i % 2 * 16)});
  host_gpu::multiply("mma", {c, wide_a, wide_b}, 16);
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  float short_a[4], short_b[2];
  for (int i = 0; i < 4; i++) short_a[i] = host_gpu::clear_low_bits(a[i], 13);
  for (int i = 0; i < 2; i++) short_b[i] = host_gpu::clear_low_bits(b[i], 13);
  host_gpu::multiply("mma_tf32", {c, short_a, short_b}, 8);
}

inline float round_tf32(float a) {
  const uint32_t bits = host_gpu::bits_of(a);
  if ((bits & 0x7f800000u) == 0x7f800000u) return a;
  return host_gpu::clear_low_bits(host_gpu::float_of(bits + 0x1000u), 13);
}

}  // namespace omnimamba
