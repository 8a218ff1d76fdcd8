// Kernels that are compiled when they are first started, for machines that have a GPU's driver and no nvcc. The host's code
// is compiled as C++ like the emulator's; a kernel is there a name alone, and NVRTC compiles its source for the chip at hand.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace omnimamba::on_demand {

// Blocks, threads of one, bytes of shared memory asked for beyond the kernel's own, blocks of a cluster, stream.
struct Grid {
  unsigned blocks[3];
  unsigned threads, shared, cluster;
  uint64_t stream;
};

// What the driver loads (machine code or PTX), and what the kernel is called in it.
struct Code {
  std::string binary, symbol;
};

// Compiles `expression`, such as "omnimamba::norm_kernel<float, 4>", of csrc/`source` for the current device.
using Compiler = std::function<Code(const std::string& source, const std::string& expression)>;
// The number of the device that CUDA's runtime takes in this thread.
using CurrentDevice = std::function<int()>;
void use(Compiler compile, CurrentDevice device);

// One instance of a kernel. Those of a module are known from its start.
class Kernel {
 public:
  Kernel(const char* source, const std::string& pretty);
  void start(const Grid& grid, void** parameters) const;
  const std::string source, expression;
};
const std::vector<const Kernel*>& kernels();

// Of the current device: 90 for 9.0.
int capability();

// Why the driver cannot be used, or nothing.
std::string why_no_driver();

}  // namespace omnimamba::on_demand
