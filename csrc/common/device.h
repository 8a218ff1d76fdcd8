#pragma once
#if !defined(__CUDACC_RTC__)
#include <string>
#endif

namespace omnimamba {

#if !defined(__CUDACC_RTC__)
// Why no CUDA kernel can run on this machine, or nothing.
std::string why_no_device();
#endif

// Whether the kernels of cuda_sm90*.cu can run: this module has them (OMNIMAMBA_SM90) and the current device has compute
// capability 9.0. Outside of such a module there is nothing to call: `#if defined(OMNIMAMBA_SM90)` around the call.
bool runs_sm90();

}  // namespace omnimamba
