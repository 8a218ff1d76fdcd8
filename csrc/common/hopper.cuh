// What Hopper adds (sm_90a): barriers in shared memory, bulk copies that arrive at them, matrix products of a warpgroup
// that read shared memory, registers moved between warps, clusters of blocks.
//
// One thread issues a bulk copy. wgmma functions are called by the 128 threads of a warpgroup together.
#pragma once
#include "launch.h"
#include "mma.cuh"
#include "tensor_map.h"

namespace omnimamba {

// 64 bits of shared memory that count arrivals and bytes, and flip a phase when both are complete.
struct alignas(8) Mbarrier {
  uint64_t bits;
};

// Where the byte at `offset` from a shared address that is a multiple of 1024 goes.
OM_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset, Swizzle s) {
  return offset ^ ((offset >> 7 & static_cast<uint32_t>(swizzle_width(s) / 16 - 1)) << 4);
}

// Which accumulator a lane of a warpgroup holds: element i of D (64 x N).
OM_HOST_DEVICE constexpr int wgmma_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
OM_HOST_DEVICE constexpr int wgmma_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

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
