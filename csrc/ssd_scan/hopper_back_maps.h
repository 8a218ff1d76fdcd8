// What the scan's backward on Hopper shows of its tensors to bulk copies.
#pragma once
#include "hopper_back_block.cuh"
#include "hopper_maps.h"

#if !defined(__CUDACC_RTC__)

namespace omnimamba::ssd {

inline int64_t back_heads_apart(const SsdScanParams& q) { return apart({&q.x, &q.dy, &q.dx}, q.headdim); }
inline int64_t back_groups_apart(const SsdScanParams& q) { return apart({&q.B, &q.C}, q.state); }

inline TensorLayout head_layout(const View& v, const SsdScanParams& q) {
  return layout_of(v, q, q.heads, q.headdim, back_heads_apart(q));
}
inline TensorLayout group_layout(const View& v, const SsdScanParams& q) {
  return layout_of(v, q, q.groups, q.state, back_groups_apart(q));
}

// Contiguous (rows, p, n).
inline TensorLayout state_layout(const View& v, const SsdScanParams& q, int64_t rows) {
  TensorLayout t;
  t.data = v.data;
  t.dtype = DType::F32;
  t.rank = 3;
  t.size[0] = static_cast<uint64_t>(q.state);
  t.size[1] = static_cast<uint64_t>(q.headdim);
  t.size[2] = static_cast<uint64_t>(rows);
  t.stride[0] = t.size[0] * sizeof(float);
  t.stride[1] = t.stride[0] * t.size[1];
  t.box[0] = PANEL_STATES;
  t.box[1] = SIDE;
  t.swizzle = Swizzle::B128;
  return t;
}

inline bool suits_back_maps(const SsdScanParams& q) {
  bool suits = true;
  for (const View* v : {&q.x, &q.dy, &q.dx}) suits = suits && suits_bulk(head_layout(*v, q));
  for (const View* v : {&q.B, &q.C}) suits = suits && suits_bulk(group_layout(*v, q));
  for (const View* v : {&q.states, &q.dstates, &q.dvarlen_states})
    suits = suits && reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
  return suits;
}

inline BackMaps back_maps(const SsdScanParams& q) {
  const int64_t chunks = chunks_of(q.length, SIDE);
  BackMaps maps{};
  maps.heads_apart = static_cast<int>(back_heads_apart(q));
  maps.groups_apart = static_cast<int>(back_groups_apart(q));
  maps.x = tensor_map(head_layout(q.x, q));
  maps.dy = tensor_map(head_layout(q.dy, q));
  TensorLayout out = head_layout(q.dx, q);
  out.box[2] = HALF_SIDE;
  maps.dx = tensor_map(out);
  maps.B = tensor_map(group_layout(q.B, q));
  maps.C = tensor_map(group_layout(q.C, q));
  maps.S = tensor_map(state_layout(q.states, q, q.batch * chunks * q.heads));
  maps.dS = tensor_map(state_layout(q.dstates, q, q.batch * chunks * q.heads));
  if (q.dvarlen_states && q.sequences > 0)
    maps.V = tensor_map(state_layout(q.dvarlen_states, q, q.sequences * q.heads));
  return maps;
}

}  // namespace omnimamba::ssd

#endif
