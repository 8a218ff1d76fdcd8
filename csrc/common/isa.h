// What the processor can run, asked at run time (safe to call from the baseline module on any processor), and what the
// module was compiled for.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace omnimamba {

struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_vnni = false;  // asked for by single kernels of the avx512 module: sums of four products of bytes
  bool amx_bf16 = false;     // the same of its products of tiles (amx.h); the system may still refuse them
};

#if defined(__x86_64__)
// Compilers older than the instructions do not know their names.
inline bool has_amx_bf16() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kSaved = 3u << 17, kXgetbv = 1u << 27;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kXgetbv) == 0) return false;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // which registers the system saves
  return (low & kSaved) == kSaved;
}
#endif

inline CpuFeatures cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
  f.amx_bf16 = f.avx512 && has_amx_bf16();
#endif
  return f;
}

// Floats in a vector of the instruction set that the module was compiled for.
int vector_width();

// Whether this module's products of tiles (amx.h) may run in this process. The first call asks the system, once for all
// threads, those that exist already and those of forks.
bool may_use_tiles();

}  // namespace omnimamba
