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

}  // namespace omnimamba
