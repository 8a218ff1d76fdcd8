// common/threads.cuh on the emulator: the compiler's keywords, shared arrays, barriers, shuffles.
#pragma once
#include <cstring>
#include <string>
#include <type_traits>

#include "../common/types.h"
#include "machine.h"

// A bare __shared__ is left undefined: it does not compile, where it would quietly become one array a thread.
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define OM_DEVICE inline

#define OM_SHARED(type, name, extent)                                                             \
  auto& name = *static_cast<type(*)[extent]>([]() -> void* {                                      \
    static char key;                                                                              \
    return ::omnimamba::host_gpu::self().block->shared.array(&key, sizeof(type) * (extent), 128); \
  }())
#define OM_SHARED_DYNAMIC(name) unsigned char* name = ::omnimamba::host_gpu::dynamic_shared()

namespace omnimamba::host_gpu {

// "gated_norm" from what the compiler calls a function with that template argument KERNEL.
std::string kernel_name(const std::string& pretty);
unsigned char* dynamic_shared();
void barrier(int id, int count, bool wait);
// Adds this lane to operation `name` of the lanes in `mask`; true for the last of them, which then does it for all by
// arguments[lane] and lets them go with finish().
bool gather(const char* name, uint32_t mask, void* argument, Together& all);

// compute(arguments) runs once for the lanes of `mask`; arguments[lane] is that lane's, null outside the mask.
template <class Argument, class Compute>
void together(const char* name, uint32_t mask, Argument& mine, Compute compute) {
  struct Posted {
    Argument* argument;
    bool done = false;
  } posted{&mine};
  Together all;
  if (gather(name, mask, &posted, all)) {
    Argument* arguments[32] = {};
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) arguments[i] = static_cast<Posted*>(all.arguments[i])->argument;
    compute(arguments);
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) static_cast<Posted*>(all.arguments[i])->done = true;
  } else {
    wait_until(name, mask, [&] { return posted.done; });
  }
}

// source(lane): which lane that one reads.
template <class T, class Source>
T exchange(const char* name, T v, uint32_t mask, Source source) {
  struct Argument {
    T in, out;
    int from;
  } mine{v, v, source(self().linear % 32)};
  together(name, mask, mine, [mask, name](Argument** all) {
    for (int i = 0; i < 32; i++) {
      if (!all[i]) continue;
      const int from = all[i]->from;
      if (from < 0 || from > 31 || !(mask >> from & 1))
        fail(std::string(name) + ": lane " + std::to_string(i) + " reads lane " + std::to_string(from) +
             ", which is not in the mask");
      all[i]->out = all[from]->in;
    }
  });
  return mine.out;
}

}  // namespace omnimamba::host_gpu

namespace omnimamba {

inline void sync_block(OM_SITE) {
  if (host_gpu::left_out("sync_block", file, line)) return;
  host_gpu::barrier(0, static_cast<int>(host_gpu::self().block->threads.size()), true);
}
inline void sync_named(int id, int count, OM_SITE) {
  if (host_gpu::left_out("sync_named", file, line)) return;
  host_gpu::barrier(id, count, true);
}
inline void arrive_named(int id, int count) { host_gpu::barrier(id, count, false); }
inline void sync_warp(uint32_t mask = 0xffffffffu, OM_SITE) {
  if (host_gpu::left_out("sync_warp", file, line)) return;
  int nothing = 0;
  host_gpu::together("sync_warp", mask, nothing, [](int**) {});
}

template <class T>
T shuffle(T v, int source, uint32_t mask = 0xffffffffu) {
  return host_gpu::exchange("shuffle", v, mask, [=](int) { return source & 31; });
}
template <class T>
T shuffle_xor(T v, int bits, uint32_t mask = 0xffffffffu) {
  return host_gpu::exchange("shuffle_xor", v, mask, [=](int lane) { return lane ^ bits; });
}
template <class T>
T shuffle_up(T v, int distance, uint32_t mask = 0xffffffffu) {
  return host_gpu::exchange("shuffle_up", v, mask, [=](int lane) { return lane < distance ? lane : lane - distance; });
}
inline uint32_t ballot(bool yes, uint32_t mask = 0xffffffffu) {
  struct Argument {
    bool yes;
    uint32_t all;
  } mine{yes, 0};
  host_gpu::together("ballot", mask, mine, [](Argument** lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++)
      if (lanes[i] && lanes[i]->yes) bits |= 1u << i;
    for (int i = 0; i < 32; i++)
      if (lanes[i]) lanes[i]->all = bits;
  });
  return mine.all;
}

}  // namespace omnimamba
