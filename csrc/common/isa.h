// What the processor can run, asked at run time (safe to call from the baseline module on any processor), and what the
// module was compiled for.
#pragma once

namespace omnimamba {

struct CpuFeatures {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_vnni = false;  // asked for by single kernels of the avx512 module: sums of four products of bytes
};

inline CpuFeatures cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return f;
}

// Floats in a vector of the instruction set that the module was compiled for.
int vector_width();

}  // namespace omnimamba
