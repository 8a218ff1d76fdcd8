// common/hopper.cuh on the emulator.
#pragma once
#include "mma.h"

namespace omnimamba {
namespace host_gpu {

void mbarrier_init(Mbarrier* bar, int count);
void mbarrier_publish();
void mbarrier_arrive(Mbarrier* bar, int bytes);
void mbarrier_wait(Mbarrier* bar, int parity);
Mbarrier* in_block(Mbarrier* bar, int rank);
// Stops with an error where all threads of the block have ended: its shared memory is then another's.
void check_alive(const Block& block, const char* what);
// Stops with an error where the thread that set it up has not published it.
void check_published(const Mbarrier* bar, const char* what);

void bulk_load(void* shared, const void* global, int bytes, Mbarrier* bar);
void tensor_load(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, int rank, const int* at);
void tensor_store(const TensorMap& map, const void* shared, int rank, const int* at);
void bulk_commit();
void bulk_wait_read(int latest);
void bulk_wait(int latest);
void cluster_sync();

// One product; `a` (8 elements) is null where A comes by descriptor.
struct Product {
  float* d;
  const float* a;
  const uint32_t* registers;  // where that was packed
  uint64_t descriptor_a, descriptor_b;
  int n;
  bool add, a_mn, b_mn;
  float (*widen)(uint16_t);
};
void wgmma(const Product& mine);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int latest);

template <class T>
float widen(uint16_t bits) {
  return to_float(T{bits});
}

}  // namespace host_gpu

inline uint32_t shared_address(const void* p) {
  host_gpu::check_shared(p, 1, "shared_address");
  return host_gpu::self().block->shared.offset(p);
}

inline void mbarrier_init(Mbarrier* bar, int count) { host_gpu::mbarrier_init(bar, count); }
inline void mbarrier_publish(OM_SITE) {
  if (!host_gpu::left_out("mbarrier_publish", file, line)) host_gpu::mbarrier_publish();
}
inline void mbarrier_arrive(Mbarrier* bar) { host_gpu::mbarrier_arrive(bar, 0); }
inline void mbarrier_arrive_expect(Mbarrier* bar, int bytes) { host_gpu::mbarrier_arrive(bar, bytes); }
inline void mbarrier_arrive_at(Mbarrier* bar, int rank) { host_gpu::mbarrier_arrive(host_gpu::in_block(bar, rank), 0); }
inline void mbarrier_wait(Mbarrier* bar, int parity, OM_SITE) {
  if (!host_gpu::left_out("mbarrier_wait", file, line)) host_gpu::mbarrier_wait(bar, parity);
}

inline void bulk_load(void* shared, const void* global, int bytes, Mbarrier* bar) {
  host_gpu::bulk_load(shared, global, bytes, bar);
}
template <class... C>
void tensor_load(void* shared, const TensorMap& map, Mbarrier* bar, C... c) {
  const int at[] = {c...};
  host_gpu::tensor_load(static_cast<uint16_t>(1u << host_gpu::self().block->rank), shared, map, bar, sizeof...(C), at);
}
template <class... C>
void tensor_load_to(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, C... c) {
  const int at[] = {c...};
  host_gpu::tensor_load(blocks, shared, map, bar, sizeof...(C), at);
}
template <class... C>
void tensor_store(const TensorMap& map, const void* shared, C... c) {
  const int at[] = {c...};
  host_gpu::tensor_store(map, shared, sizeof...(C), at);
}
inline void bulk_commit() { host_gpu::bulk_commit(); }
template <int N>
void bulk_wait_read(OM_SITE) {
  if (!host_gpu::left_out("bulk_wait_read", file, line)) host_gpu::bulk_wait_read(N);
}
template <int N>
void bulk_wait(OM_SITE) {
  if (!host_gpu::left_out("bulk_wait", file, line)) host_gpu::bulk_wait(N);
}
inline void async_fence(OM_SITE) {
  if (!host_gpu::left_out("async_fence", file, line)) host_gpu::async_fence();
}

template <bool TRANSPOSED>
void store_matrices(void* row, const uint32_t (&from)[4]) {
  host_gpu::store_matrices(row, TRANSPOSED, from);
}

inline int cluster_rank() { return static_cast<int>(host_gpu::self().block->rank); }
inline void cluster_sync(OM_SITE) {
  if (!host_gpu::left_out("cluster_sync", file, line)) host_gpu::cluster_sync();
}
template <int N>
void take_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void give_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

inline void wgmma_fence(OM_SITE) {
  if (!host_gpu::left_out("wgmma_fence", file, line)) host_gpu::wgmma_fence();
}
inline void wgmma_commit() { host_gpu::wgmma_commit(); }
template <int N>
void wgmma_wait(OM_SITE) {
  if (!host_gpu::left_out("wgmma_wait", file, line)) host_gpu::wgmma_wait(N);
}
template <int N>
void hold(float (&)[N]) {}
inline int unknown(int v) { return v; }

template <class T, int N, bool A_MN = false, bool B_MN = false>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  host_gpu::wgmma({d, nullptr, nullptr, a, b, N, add, A_MN, B_MN, host_gpu::widen<T>});
}
template <class T, int N, bool B_MN = false>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  float wide[8];
  for (int i = 0; i < 8; i++) wide[i] = to_float(T{static_cast<uint16_t>(a[i / 2] >> i % 2 * 16)});
  host_gpu::wgmma({d, wide, a, 0, b, N, add, false, B_MN, host_gpu::widen<T>});
}

// Refuses what the driver refuses.
TensorMap tensor_map(const TensorLayout& t);

}  // namespace omnimamba
