// Storage types, and View: how a torch tensor reaches a kernel.
#pragma once
#include <cstdint>
#include <cstring>

// Before a function that device code may call too.
#if defined(__CUDACC__)
#define OM_HOST_DEVICE __host__ __device__
#else
#define OM_HOST_DEVICE
#endif

namespace omnimamba {

enum class DType : int { F32, BF16, F16, I32, I64, I8 };

struct bf16 {
  static constexpr bool IS_BF16 = true;
  uint16_t bits;
};
struct f16 {
  static constexpr bool IS_BF16 = false;
  uint16_t bits;
};

// A tensor's first element and its strides, in elements. data is null where the tensor is absent.
struct View {
  void* data = nullptr;
  DType dtype = DType::F32;
  int64_t stride[4] = {0, 0, 0, 0};

  OM_HOST_DEVICE explicit operator bool() const { return data != nullptr; }

  template <class T>
  OM_HOST_DEVICE T* at(int64_t i = 0, int64_t j = 0, int64_t k = 0, int64_t m = 0) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1] + k * stride[2] + m * stride[3];
  }
};

// Calls body(T{}) with the storage type that dtype names: the one switch over floating types.
template <class Body>
void for_float_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::BF16: return body(bf16{});
    case DType::F16: return body(f16{});
    default: return body(float{});
  }
}

}  // namespace omnimamba
