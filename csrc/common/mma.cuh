// The warp's matrix instructions: D (16 x 8) += A (16 x k) B (k x 8), float accumulators. Each lane holds some elements
// of each matrix; the functions of `fragment` say which.
#pragma once
#include "memory.cuh"

namespace omnimamba {

// Element i of a lane's part of a matrix.
struct Place {
  int row, column;
};

namespace fragment {

// 16-bit A (16 x 16): 8 elements, two a register, the earlier in the low half.
OM_HOST_DEVICE constexpr Place a16(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
// 16-bit B (16 x 8): 4 elements, two a register.
OM_HOST_DEVICE constexpr Place b16(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
// tf32 A (16 x 8): 4 elements. tf32 B (8 x 8): 2.
OM_HOST_DEVICE constexpr Place a32(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4}; }
OM_HOST_DEVICE constexpr Place b32(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
// Accumulators (16 x 8): 4 elements.
OM_HOST_DEVICE constexpr Place c(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }
// What load_matrices puts into register j of a lane: two elements of the j-th 8 x 8 matrix. Transposed: of its transpose.
OM_HOST_DEVICE constexpr Place loaded(int lane, int i) { return {lane / 4, lane % 4 * 2 + i}; }

}  // namespace fragment

#if defined(OMNIMAMBA_EMULATED)
}  // namespace omnimamba
#include "../host_gpu/mma.h"
namespace omnimamba {
#else

// N (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory into the warp's registers. Lane 8 j + r gives the
// address of row r of matrix j: 16 bytes, a multiple of 16. All lanes call it.
template <bool TRANSPOSED, int N>
OM_DEVICE void load_matrices(uint32_t (&out)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 4 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (N == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  else if constexpr (N == 2 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (N == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(at) : "memory");
}

// c += A B, k = 16, elements of T (bf16 or f16). All lanes call it.
template <class T>
OM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2 && T::IS_BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A B, k = 8, elements tf32: floats of which the hardware reads the upper 19 bits.
OM_DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// A float rounded to the nearest tf32, ties away from zero: what mma_tf32 should be given.
OM_DEVICE float round_tf32(float a) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(a));
  return __uint_as_float(out);
}

#endif

// Two values as one register of a 16-bit fragment.
template <class T>
OM_DEVICE uint32_t pack_two(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace omnimamba
