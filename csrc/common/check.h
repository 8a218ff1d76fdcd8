// A broken promise of the caller becomes ValueError in Python.
#pragma once
#if defined(__CUDACC_RTC__)

namespace omnimamba {

inline void check(bool, const char*) {}  // NVRTC reads the host's functions, which nothing calls there

}  // namespace omnimamba

#else
#include <stdexcept>
#include <string>

namespace omnimamba {

inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace omnimamba

#endif
