#include "machine.h"

namespace omnimamba::host_gpu {

Settings& settings() {
  static Settings s;
  return s;
}

// "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
std::size_t most_shared() {
  switch (settings().capability) {
    case 80: return 163 << 10;
    case 90:
    case 100: return 227 << 10;
    default: return 99 << 10;  // 8.6, 8.9, 12.0
  }
}

}  // namespace omnimamba::host_gpu

// For the tests, through ctypes: the order of the threads, and whether copies land at once.
extern "C" __attribute__((visibility("default"), used)) void omnimamba_emulator_settings(uint64_t seed,
                                                                                         int early_copies) {
  omnimamba::host_gpu::settings().seed = seed;
  omnimamba::host_gpu::settings().early_copies = early_copies != 0;
}

// As whose chip the machine shows itself to the host's code: its compute capability, 90 for 9.0.
extern "C" __attribute__((visibility("default"), used)) void omnimamba_emulator_chip(int capability) {
  omnimamba::host_gpu::settings().capability = capability;
}
