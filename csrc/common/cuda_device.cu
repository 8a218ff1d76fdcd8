#include "device.h"

#include "launch.h"

namespace omnimamba {

std::string why_no_device() {
#if defined(OMNIMAMBA_ON_DEMAND)
  return on_demand::why_no_driver();
#elif defined(OMNIMAMBA_EMULATED)
  return "";
#else
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // the next call starts clean
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
#endif
}

bool runs_sm90() {
#if !defined(OMNIMAMBA_SM90)
  return false;
#elif defined(OMNIMAMBA_ON_DEMAND)
  return on_demand::capability() == 90;
#elif defined(OMNIMAMBA_EMULATED)
  return host_gpu::settings().capability == 90;
#else
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return major == 9 && minor == 0;
#endif
}

}  // namespace omnimamba
