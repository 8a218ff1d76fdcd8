// The threads of a block: their shared memory, their barriers, and how the lanes of a warp read one another.
// Blocks are one-dimensional. Every function named here is called by all the threads it concerns.
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

#if defined(OMNIMAMBA_EMULATED)
#include "../host_gpu/threads.h"
#else

#define OM_DEVICE __device__ __forceinline__

// `type name[extent]` shared by the block, at a multiple of 128 bytes; and what launch() was told to add to it, of 1024.
// Garbage at first.
#define OM_SHARED(type, name, extent) __shared__ __align__(128) type name[extent]
#define OM_SHARED_DYNAMIC(name) extern __shared__ __align__(1024) unsigned char name[]

namespace omnimamba {

// All threads of the block arrive; what they wrote to shared or global memory before, all of them see after.
OM_DEVICE void sync_block() { __syncthreads(); }

// The same among the lanes of `mask`.
OM_DEVICE void sync_warp(uint32_t mask = 0xffffffffu) { __syncwarp(mask); }

// The same among the `count` threads that come to barrier `id` (1 to 15; count a multiple of 32).
OM_DEVICE void sync_named(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }

// Counts as arrived at barrier `id`, and goes on.
OM_DEVICE void arrive_named(int id, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }

// `v` of lane `source`. Every lane of `mask` calls it, and none outside; the source lies in the mask.
template <class T>
OM_DEVICE T shuffle(T v, int source, uint32_t mask = 0xffffffffu) {
  return __shfl_sync(mask, v, source);
}

// `v` of the lane whose number differs in the bits of `bits`.
template <class T>
OM_DEVICE T shuffle_xor(T v, int bits, uint32_t mask = 0xffffffffu) {
  return __shfl_xor_sync(mask, v, bits);
}

// `v` of the lane `distance` below; the first lanes keep their own.
template <class T>
OM_DEVICE T shuffle_up(T v, int distance, uint32_t mask = 0xffffffffu) {
  return __shfl_up_sync(mask, v, distance);
}

// One bit a lane: whether `yes` holds there.
OM_DEVICE uint32_t ballot(bool yes, uint32_t mask = 0xffffffffu) { return __ballot_sync(mask, yes); }

}  // namespace omnimamba
#endif

namespace omnimamba {

constexpr int WARP = 32;
OM_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % WARP; }
OM_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / WARP; }

}  // namespace omnimamba
