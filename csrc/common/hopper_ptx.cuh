// The instructions behind hopper.cuh.
#pragma once

namespace omnimamba {

OM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarrier ----

// One thread sets it up for `count` arrivals a phase; mbarrier_publish() and a barrier of the threads follow.
OM_DEVICE void mbarrier_init(Mbarrier* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
OM_DEVICE void mbarrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

OM_DEVICE void mbarrier_arrive(Mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Arrives, and the phase also waits for that many bytes of bulk copies.
OM_DEVICE void mbarrier_arrive_expect(Mbarrier* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of a block of the cluster: says that this thread has read what it waited for. What it wrote is
// not published to the other block: that would cost a fence of the whole chip.
OM_DEVICE void mbarrier_arrive_at(Mbarrier* bar, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}

// Until the phase of that parity is complete: 0 for the first, 1 for the second, 0 for the third ...
OM_DEVICE void mbarrier_wait(Mbarrier* bar, int parity) {
  uint32_t complete = 0;
  while (!complete)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(complete)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
}

// ---- bulk copies ----

// `bytes` neighbours (addresses and bytes multiples of 16) to shared memory, arriving at `bar`.
OM_DEVICE void bulk_load(void* shared, const void* global, int bytes, Mbarrier* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// The box whose first element is `at` (innermost first) to shared memory (a multiple of 128 bytes), arriving at `bar`.
OM_DEVICE void tensor_load(void* shared, const TensorMap& map, Mbarrier* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(bar)), "r"(c0), "r"(c1)
      : "memory");
}
OM_DEVICE void tensor_load(void* shared, const TensorMap& map, Mbarrier* bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
OM_DEVICE void tensor_load(void* shared, const TensorMap& map, Mbarrier* bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same to every block of the cluster whose bit is set in `blocks`, at the same place and barrier in each.
OM_DEVICE void tensor_load_to(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}
OM_DEVICE void tensor_load_to(uint16_t blocks, void* shared, const TensorMap& map, Mbarrier* bar, int c0, int c1,
                              int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// A box from shared memory to the tensor. Before it: async_fence() by the threads that wrote the box, then a barrier.
OM_DEVICE void tensor_store(const TensorMap& map, const void* shared, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
OM_DEVICE void tensor_store(const TensorMap& map, const void* shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
OM_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores, but for the latest N groups, have read shared memory.
template <int N>
OM_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until what they wrote to global memory is there for this thread.
template <int N>
OM_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// What this thread wrote to shared memory is there for bulk copies and wgmma.
OM_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// load_matrices the other way: four matrices of 8 x 8 16-bit elements from the warp's registers to shared memory.
template <bool TRANSPOSED>
OM_DEVICE void store_matrices(void* row, const uint32_t (&from)[4]) {
  if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// ---- clusters, registers ----

OM_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all blocks of the cluster.
OM_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A warpgroup asks for, or gives away, registers: N a thread from here on, a multiple of 8.
template <int N>
OM_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
OM_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- wgmma ----

// Before the first wgmma, and whenever registers that one reads have been written.
OM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit become one group.
OM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the latest N are complete. Then hold() each accumulator array before reading it.
template <int N>
OM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads and writes of these registers across.
template <int N>
OM_DEVICE void hold(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// v; the compiler does not know that, and so computes what comes of it where it stands.
OM_DEVICE int unknown(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

#define OM_R8 "{%0, %1, %2, %3, %4, %5, %6, %7"
#define OM_R16 OM_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define OM_R32 OM_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OM_R64                                                                                        \
  OM_R32                                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OM_R128                                                                                             \
  OM_R64                                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "       \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, " \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "  \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define OM_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define OM_D8(i) OM_D4(i), OM_D4((i) + 4)
#define OM_D16(i) OM_D8(i), OM_D8((i) + 8)
#define OM_D32(i) OM_D16(i), OM_D16((i) + 16)
#define OM_D64(i) OM_D32(i), OM_D32((i) + 32)
#define OM_D128(i) OM_D64(i), OM_D64((i) + 64)

// The instruction for R accumulators a thread: operands R .. R + 4 are the two descriptors, add, and how A and B lie.
#define OM_WGMMA(N, R, TYPE, o0, o1, o2, o3, o4)                                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " " OM_R##R "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"                         \
               : OM_D##R(0)                                                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(A_MN), "n"(B_MN))
// The same with A in four registers: operands R .. R + 6.
#define OM_WGMMA_R(N, R, TYPE, o0, o1, o2, o3, o4, o5, o6)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " " OM_R##R "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"   \
               : OM_D##R(0)                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(B_MN))

// d (64 x N) = A (64 x 16) B (16 x N), plus d where `add`; matrices of T by descriptor, K-major unless A_MN or B_MN.
template <class T, int N, bool A_MN = false, bool B_MN = false>
OM_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
#define OM_SIZES(TYPE)                                                 \
  if constexpr (N == 16) OM_WGMMA(16, 8, TYPE, 8, 9, 10, 11, 12);      \
  if constexpr (N == 32) OM_WGMMA(32, 16, TYPE, 16, 17, 18, 19, 20);   \
  if constexpr (N == 64) OM_WGMMA(64, 32, TYPE, 32, 33, 34, 35, 36);   \
  if constexpr (N == 128) OM_WGMMA(128, 64, TYPE, 64, 65, 66, 67, 68); \
  if constexpr (N == 256) OM_WGMMA(256, 128, TYPE, 128, 129, 130, 131, 132)
  if constexpr (T::IS_BF16) {
    OM_SIZES("bf16");
  } else {
    OM_SIZES("f16");
  }
#undef OM_SIZES
}

// The same with A in registers, laid out as mma's A: warp w holds the rows 16 w to 16 w + 15.
template <class T, int N, bool B_MN = false>
OM_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
#define OM_SIZES(TYPE)                                                           \
  if constexpr (N == 16) OM_WGMMA_R(16, 8, TYPE, 8, 9, 10, 11, 12, 13, 14);      \
  if constexpr (N == 32) OM_WGMMA_R(32, 16, TYPE, 16, 17, 18, 19, 20, 21, 22);   \
  if constexpr (N == 64) OM_WGMMA_R(64, 32, TYPE, 32, 33, 34, 35, 36, 37, 38);   \
  if constexpr (N == 128) OM_WGMMA_R(128, 64, TYPE, 64, 65, 66, 67, 68, 69, 70); \
  if constexpr (N == 256) OM_WGMMA_R(256, 128, TYPE, 128, 129, 130, 131, 132, 133, 134)
  if constexpr (T::IS_BF16) {
    OM_SIZES("bf16");
  } else {
    OM_SIZES("f16");
  }
#undef OM_SIZES
}

#undef OM_WGMMA
#undef OM_WGMMA_R

// ---- the host's side ----

#if !defined(__CUDACC_RTC__)

// The map of a tensor, made by the driver.
inline TensorMap tensor_map(const TensorLayout& t) {
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
#endif
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return encoded(encode, t);
}

#endif

}  // namespace omnimamba
