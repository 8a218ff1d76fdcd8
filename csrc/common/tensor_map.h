// Tensor maps: what bulk copies (hopper.cuh) know of a tensor in global memory. The driver makes them, on the host, without
// allocation and without waiting for anything.
#pragma once
#include "types.h"

#if !defined(__CUDACC_RTC__)
#include <stdexcept>
#include <string>
#endif

namespace omnimamba {

// How a bulk copy orders the 16-byte pieces of rows as wide as the name says: pieces are XORed with bits 7 and up of the
// shared address, so that a column of them lies in different banks. The value is the code of matrix descriptors.
enum class Swizzle : int { NONE = 0, B128 = 1, B64 = 2, B32 = 3 };

OM_HOST_DEVICE constexpr int swizzle_width(Swizzle s) {
  return s == Swizzle::B128 ? 128 : s == Swizzle::B64 ? 64 : s == Swizzle::B32 ? 32 : 16;
}

// A tensor in global memory, as bulk copies see it; passed to the kernel as a __grid_constant__.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// What the host says of a tensor: sizes and box in elements, the innermost dimension first; strides in bytes, of the
// dimensions after the innermost. Parts of a box outside the tensor are zeros when read and not written.
struct TensorLayout {
  void* data = nullptr;
  DType dtype = DType::BF16;
  int rank = 2;
  uint64_t size[5] = {1, 1, 1, 1, 1};
  uint64_t stride[4] = {0, 0, 0, 0};  // multiples of 16
  uint32_t box[5] = {1, 1, 1, 1, 1};  // at most 256
  Swizzle swizzle = Swizzle::NONE;    // box[0] then fills the swizzle's width
};

#if !defined(__CUDACC_RTC__)

// cuTensorMapEncodeTiled, as the driver's ABI has it: there may be no toolkit, so no cuda.h.
using EncodeTiled = int (*)(TensorMap* map, int type, uint32_t rank, void* data, const uint64_t* size,
                            const uint64_t* stride, const uint32_t* box, const uint32_t* steps, int interleave,
                            int swizzle, int promotion, int fill);

inline TensorMap encoded(EncodeTiled encode, const TensorLayout& t) {
  if (encode == nullptr) throw std::runtime_error("CUDA: the NVIDIA driver is too old: it has no tensor maps");
  constexpr int TYPES[] = {7, 9, 6, 3, 5}, SWIZZLES[] = {0, 3, 2, 1};  // of DType and of Swizzle, in the driver's words
  constexpr int NO_INTERLEAVE = 0, PROMOTE_256_BYTES = 3, FILL_WITH_ZEROS = 0;
  constexpr uint32_t STEPS[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const int status =
      encode(&map, TYPES[static_cast<int>(t.dtype)], static_cast<uint32_t>(t.rank), t.data, t.size, t.stride, t.box,
             STEPS, NO_INTERLEAVE, SWIZZLES[static_cast<int>(t.swizzle)], PROMOTE_256_BYTES, FILL_WITH_ZEROS);
  if (status != 0) throw std::runtime_error("CUDA: a tensor map was refused with error " + std::to_string(status));
  return map;
}

#endif

}  // namespace omnimamba
