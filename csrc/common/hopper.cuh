// What Hopper adds (sm_90a): barriers in shared memory, bulk copies that arrive at them, matrix products of a warpgroup
// that read shared memory, registers moved between warps, clusters of blocks.
//
// One thread issues a bulk copy. wgmma functions are called by the 128 threads of a warpgroup together.
#pragma once
#include "launch.h"
#include "mma.cuh"

namespace omnimamba {

// 64 bits of shared memory that count arrivals and bytes, and flip a phase when both are complete.
struct alignas(8) Mbarrier {
  uint64_t bits;
};

// How a bulk copy orders the 16-byte pieces of rows as wide as the name says: pieces are XORed with bits 7 and up of the
// shared address, so that a column of them lies in different banks. The value is the code of matrix descriptors.
enum class Swizzle : int { NONE = 0, B128 = 1, B64 = 2, B32 = 3 };

OM_HOST_DEVICE constexpr int swizzle_width(Swizzle s) {
  return s == Swizzle::B128 ? 128 : s == Swizzle::B64 ? 64 : s == Swizzle::B32 ? 32 : 16;
}

// Where the byte at `offset` from a shared address that is a multiple of 1024 goes.
OM_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset, Swizzle s) {
  return offset ^ ((offset >> 7 & static_cast<uint32_t>(swizzle_width(s) / 16 - 1)) << 4);
}

// Which accumulator a lane of a warpgroup holds: element i of D (64 x N).
OM_HOST_DEVICE constexpr int wgmma_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
OM_HOST_DEVICE constexpr int wgmma_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A tensor in global memory, as bulk copies see it; passed to the kernel as a __grid_constant__.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What the host says of a tensor: sizes and box in elements, the innermost dimension first; strides in bytes, of the
// dimensions after the innermost. Parts of a box outside the tensor are zeros when read and not written.
struct TensorLayout {
  void* data = nullptr;
  DType dtype = DType::BF16;
  int rank = 2;
  uint64_t size[5] = {1, 1, 1, 1, 1};
  uint64_t stride[4] = {0, 0, 0, 0};  // multiples of 16
  uint32_t box[5] = {1, 1, 1, 1, 1};  // at most 256
  Swizzle swizzle = Swizzle::NONE;    // box[0] then fills the swizzle's width
};

// The 64-bit description of a matrix in shared memory. K-major: rows of the swizzle's width along k; `stride` bytes lie
// between groups of 8 rows (`leading` between 8-element columns without swizzle). MN-major: k rows of the swizzle's width
// along m or n; `leading` bytes between neighbours along m or n, `stride` between groups of 8 k.
OM_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t shared_address, uint32_t leading, uint32_t stride,
                                                    Swizzle s) {
  return static_cast<uint64_t>(shared_address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(s) << 62;
}

}  // namespace omnimamba

#if defined(OMNIMAMBA_EMULATED)
#include "../host_gpu/hopper.h"
#else
#include "hopper_ptx.cuh"
#endif
