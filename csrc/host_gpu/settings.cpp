#include "machine.h"

namespace omnimamba::host_gpu {

Settings& settings() {
  static Settings s;
  return s;
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
