#pragma once
#include <string>

namespace omnimamba {

// Why no CUDA kernel can run on this machine, or nothing.
std::string why_no_device();

}  // namespace omnimamba
