// A broken promise of the caller becomes ValueError in Python.
#pragma once
#include <stdexcept>
#include <string>

namespace omnimamba {

inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace omnimamba
