// How the scan's Hopper kernels show their tensors to bulk copies.
#pragma once
#if !defined(__CUDACC_RTC__)
#include <initializer_list>

#include "hopper_block.cuh"

namespace omnimamba::ssd {

// Columns that lie side by side over all heads or groups, in whole tiles: one row for the bulk copies.
inline int64_t apart(std::initializer_list<const View*> views, int64_t columns) {
  bool beside = columns % SIDE == 0;
  for (const View* v : views) beside = beside && (!*v || v->stride[2] == columns);
  return beside ? columns : 0;
}

// (columns, heads or groups, positions, batch rows). A dimension of one has a stride that suits its neighbours.
inline TensorLayout layout_of(const View& v, const SsdScanParams& q, int64_t middle, int64_t columns, int64_t apart) {
  const int64_t size[4] = {apart ? middle * columns : columns, apart ? 1 : middle, q.length, q.batch};
  TensorLayout t;
  t.data = v.data;
  t.rank = 4;
  for (int i = 0; i < 4; i++) t.size[i] = static_cast<uint64_t>(size[i]);
  for (int i = 2; i >= 0; i--) {
    const auto own = static_cast<uint64_t>(v.stride[2 - i]) * sizeof(bf16);
    t.stride[i] = size[i + 1] > 1 || i == 2 ? own : t.stride[i + 1];
  }
  for (int i = 0; i < 3; i++)
    if (size[i + 1] == 1 && (i == 2 || t.stride[i] == 0)) t.stride[i] = i > 0 ? t.stride[i - 1] * t.size[i] : 16;
  t.box[0] = t.box[2] = SIDE;
  t.swizzle = Swizzle::B128;
  return t;
}

// What the driver asks of a tensor.
inline bool suits_bulk(const TensorLayout& t) {
  bool suits = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; i++) {
    suits = suits && t.stride[i] > 0 && t.stride[i] % 16 == 0 && t.stride[i] < (uint64_t{1} << 40);
    suits = suits && (i == 0 || t.stride[i] % t.stride[i - 1] == 0);
  }
  return suits;
}

}  // namespace omnimamba::ssd

#endif
