// What the processor can run, asked at run time (safe to call from the baseline module on any processor), and what the
// module was compiled for.
#pragma once

namespace omnimamba {

struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
};

inline CpuFeatures cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return f;
}

// Asked for by single kernels of the avx512 module: sums of four products of bytes.
inline bool cpu_has_avx512_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Floats in a vector of the instruction set that the module was compiled for.
int vector_width();

}  // namespace omnimamba
