// launch(): how the host starts a kernel. One plain call in place of the triple chevrons, so that a host compiler can read
// every .cu file; it checks the launch, allocates nothing, waits for nothing, and may be captured into a CUDA graph.
#pragma once
#include "threads.cuh"

#if !defined(__CUDACC_RTC__)
#include <cstdint>
#include <stdexcept>
#include <string>
#if defined(OMNIMAMBA_ON_DEMAND)
#include "on_demand.h"
#elif !defined(OMNIMAMBA_EMULATED)
#include <cuda_runtime.h>

#include "launch_text.h"
#endif
#endif

namespace omnimamba {

// a / b rounded up.
OM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if !defined(__CUDACC_RTC__)  // NVRTC compiles kernels alone

// How many blocks, of how many threads, and the stream (a cudaStream_t as the caller's library gives it).
struct Shape {
  dim3 blocks;
  int threads;
  uint64_t stream = 0;
  size_t shared = 0;     // bytes beyond what the kernel declares
  unsigned cluster = 1;  // blocks along x that run together
};

#if defined(OMNIMAMBA_ON_DEMAND)

// Named after what the compiler calls a function of that kernel, and known to the module from the start.
template <auto KERNEL>
struct OnDemand {
  static const char* name() { return __PRETTY_FUNCTION__; }
  static inline on_demand::Kernel kernel{OMNIMAMBA_SOURCE, name()};
};

template <auto KERNEL, class... Parameters>
void start(const Shape& shape, const Parameters&... parameters) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  OnDemand<KERNEL>::kernel.start({{shape.blocks.x, shape.blocks.y, shape.blocks.z},
                                  static_cast<unsigned>(shape.threads),
                                  static_cast<unsigned>(shape.shared),
                                  shape.cluster,
                                  shape.stream},
                                 pointers);
}

#elif defined(OMNIMAMBA_EMULATED)

template <auto KERNEL, class... Parameters>
void start(const Shape& shape, const Parameters&... parameters) {
  static const std::string name = host_gpu::kernel_name(__PRETTY_FUNCTION__);
  host_gpu::run_grid(
      {name.c_str(), shape.blocks, dim3(static_cast<unsigned>(shape.threads)), shape.cluster, shape.shared},
      [&] { KERNEL(parameters...); });
}

#else

inline void check_cuda(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call starts clean
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(status));
}

template <auto KERNEL, class... Parameters>
void start(const Shape& shape, const Parameters&... parameters) {
  const auto* kernel = reinterpret_cast<const void*>(KERNEL);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = reinterpret_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute cluster{};
  if (shape.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  const auto check = [&shape, name = __PRETTY_FUNCTION__](cudaError_t status) {
    const auto& [x, y, z] = shape.blocks;
    if (status) check_cuda(status, launch_of(kernel_in(name), {x, y, z}, shape.threads, shape.shared, shape.cluster));
  };
  if (shape.shared > (48u << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  check(cudaLaunchKernelExC(&config, kernel, pointers));
}

#endif

template <auto KERNEL, class... Parameters, class... Arguments>
void launch_as(void (*)(Parameters...), const Shape& shape, const Arguments&... arguments) {
  start<KERNEL, Parameters...>(shape, static_cast<Parameters>(arguments)...);
}

// kernel<<<...>>>(arguments...), each converted to its parameter's type.
template <auto KERNEL, class... Arguments>
void launch(const Shape& shape, Arguments... arguments) {
  launch_as<KERNEL>(decltype(KERNEL){}, shape, arguments...);  // for its type
}

// A grid of x by y by z blocks; where y or z is more than a grid can have, blocks walk on by gridDim.y and gridDim.z.
inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  auto most = [](int64_t n) { return static_cast<unsigned>(n < 65535 ? n : 65535); };
  return dim3(static_cast<unsigned>(x), most(y), most(z));
}

// Whole warps for `count` threads, at most `most`.
constexpr int warps_for(int64_t count, int most) {
  return count < most ? static_cast<int>(ceil_div(count < 1 ? 1 : count, WARP)) * WARP : most;
}

#endif

}  // namespace omnimamba
