// The entries of the library, and kernels that show what an instruction does with each register: the test compares
// them with tables from elsewhere.
#include "harness.h"

namespace trials {
namespace {

// c = a b by one mma, every element taken from where the tables say: element i of lane l is at table[l * count + i].
template <class T>
__global__ void mma_kernel(const float* a, const float* b, float* c, const int* table_a, const int* table_b,
                           const int* table_c) {
  uint32_t ra[4], rb[2];
  float rc[4] = {};
  const int lane = lane_id();
  for (int i = 0; i < 4; i++) ra[i] = pack_two<T>(a[table_a[lane * 8 + 2 * i]], a[table_a[lane * 8 + 2 * i + 1]]);
  for (int i = 0; i < 2; i++) rb[i] = pack_two<T>(b[table_b[lane * 4 + 2 * i]], b[table_b[lane * 4 + 2 * i + 1]]);
  mma<T>(rc, ra, rb);
  for (int i = 0; i < 4; i++) c[table_c[lane * 4 + i]] = rc[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, float* c, const int* table_a, const int* table_b,
                                const int* table_c) {
  float ra[4], rb[2], rc[4] = {};
  const int lane = lane_id();
  for (int i = 0; i < 4; i++) ra[i] = a[table_a[lane * 4 + i]];
  for (int i = 0; i < 2; i++) rb[i] = b[table_b[lane * 2 + i]];
  mma_tf32(rc, ra, rb);
  for (int i = 0; i < 4; i++) c[table_c[lane * 4 + i]] = rc[i];
}

// out[lane, register]: what ldmatrix gives for N matrices that lie one after another.
template <bool TRANSPOSED, int N>
__global__ void load_kernel(const uint16_t* matrices, uint32_t* out) {
  OM_SHARED(uint16_t, tile, 64 * 4);
  for (int i = lane_id(); i < 64 * N; i += WARP) tile[i] = matrices[i];
  sync_warp();
  uint32_t registers[N];
  load_matrices<TRANSPOSED>(registers, tile + lane_id() % (8 * N) * 8);
  for (int j = 0; j < N; j++) out[lane_id() * N + j] = registers[j];
}

// The bytes of four matrices, one after another, that stmatrix writes from registers[lane, register].
template <bool TRANSPOSED>
__global__ void store_kernel(const uint32_t* registers, uint16_t* matrices) {
  OM_SHARED(uint16_t, tile, 64 * 4);
  const uint32_t* mine = registers + lane_id() * 4;
  const uint32_t from[4] = {mine[0], mine[1], mine[2], mine[3]};
  store_matrices<TRANSPOSED>(tile + lane_id() * 8, from);
  sync_warp();
  for (int i = lane_id(); i < 64 * 4; i += WARP) matrices[i] = tile[i];
}

// d[thread, i] of one wgmma on an image of shared memory; a_offset < 0: A from registers, by mma's layout.
template <int N, bool A_MN, bool B_MN>
__global__ void wgmma_kernel(const unsigned char* image, int bytes, const float* a, const int* table_a, float* out,
                             int a_offset, int b_offset, int a_leading, int a_stride, int b_leading, int b_stride,
                             int swizzle) {
  OM_SHARED_DYNAMIC(shared);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 128) shared[i] = image[i];
  async_fence();
  sync_block();
  float d[N / 2];
  const auto s = Swizzle{swizzle};
  const uint32_t base = shared_address(shared);
  const uint64_t b = matrix_descriptor(base + static_cast<uint32_t>(b_offset), static_cast<uint32_t>(b_leading),
                                       static_cast<uint32_t>(b_stride), s);
  wgmma_fence();
  if (a_offset < 0) {
    uint32_t registers[4];
    const int* at = table_a + threadIdx.x * 8;
    for (int i = 0; i < 4; i++) registers[i] = pack_two<bf16>(a[at[2 * i]], a[at[2 * i + 1]]);
    wgmma<bf16, N, B_MN>(d, registers, b, false);
  } else {
    wgmma<bf16, N, A_MN, B_MN>(d,
                               matrix_descriptor(base + static_cast<uint32_t>(a_offset),
                                                 static_cast<uint32_t>(a_leading), static_cast<uint32_t>(a_stride), s),
                               b, false);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
  for (int i = 0; i < N / 2; i++) out[threadIdx.x * (N / 2) + static_cast<unsigned>(i)] = d[i];
}

// The bytes of shared memory after a bulk copy of one box.
__global__ void box_kernel(const __grid_constant__ TensorMap map, unsigned char* out, int bytes, int c0, int c1) {
  OM_SHARED_DYNAMIC(shared);
  OM_SHARED(Mbarrier, bar, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_publish();
    mbarrier_arrive_expect(bar, bytes);
    tensor_load(shared, map, bar, c0, c1);
  }
  sync_block();
  mbarrier_wait(bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) out[i] = shared[i];
}

}  // namespace
}  // namespace trials

#define ENTRY extern "C" __attribute__((visibility("default"))) void
using namespace trials;

ENTRY layout_mma(int kind, const float* a, const float* b, float* c, const int* ta, const int* tb, const int* tc) {
  if (kind == 0) launch<mma_kernel<bf16>>({dim3(1), 32}, a, b, c, ta, tb, tc);
  if (kind == 1) launch<mma_kernel<f16>>({dim3(1), 32}, a, b, c, ta, tb, tc);
  if (kind == 2) launch<mma_tf32_kernel>({dim3(1), 32}, a, b, c, ta, tb, tc);
}

ENTRY layout_load(int transposed, int n, const uint16_t* matrices, uint32_t* out) {
  const Shape one{dim3(1), 32};
  if (n == 1)
    transposed ? launch<load_kernel<true, 1>>(one, matrices, out) : launch<load_kernel<false, 1>>(one, matrices, out);
  if (n == 2)
    transposed ? launch<load_kernel<true, 2>>(one, matrices, out) : launch<load_kernel<false, 2>>(one, matrices, out);
  if (n == 4)
    transposed ? launch<load_kernel<true, 4>>(one, matrices, out) : launch<load_kernel<false, 4>>(one, matrices, out);
}

ENTRY layout_store(int transposed, const uint32_t* registers, uint16_t* matrices) {
  const Shape one{dim3(1), 32};
  transposed ? launch<store_kernel<true>>(one, registers, matrices)
             : launch<store_kernel<false>>(one, registers, matrices);
}

template <int N>
static void run_wgmma(int majors, const unsigned char* image, int bytes, const float* a, const int* table_a, float* out,
                      const int* where) {
  const Shape one{dim3(1), 128, 0, static_cast<std::size_t>(bytes)};
#define RUN(A, B)                                                                                                     \
  launch<wgmma_kernel<N, A, B>>(one, image, bytes, a, table_a, out, where[0], where[1], where[2], where[3], where[4], \
                                where[5], where[6])
  if (majors == 0) RUN(false, false);
  if (majors == 1) RUN(true, false);
  if (majors == 2) RUN(false, true);
  if (majors == 3) RUN(true, true);
#undef RUN
}

// majors: bit 0 A, bit 1 B is MN-major. where: offsets of A and B, leading and stride of A and of B, swizzle.
ENTRY layout_wgmma(int n, int majors, const unsigned char* image, int bytes, const float* a, const int* table_a,
                   float* out, const int* where) {
  if (n == 16) run_wgmma<16>(majors, image, bytes, a, table_a, out, where);
  if (n == 32) run_wgmma<32>(majors, image, bytes, a, table_a, out, where);
  if (n == 64) run_wgmma<64>(majors, image, bytes, a, table_a, out, where);
  if (n == 128) run_wgmma<128>(majors, image, bytes, a, table_a, out, where);
  if (n == 256) run_wgmma<256>(majors, image, bytes, a, table_a, out, where);
}

// A box of 16-bit elements (rows x columns) at (c0, c1) of a tensor of height x width.
ENTRY layout_box(uint16_t* data, int height, int width, int rows, int columns, int swizzle, int c0, int c1,
                 unsigned char* out) {
  TensorLayout t;
  t.data = data;
  t.size[0] = static_cast<uint64_t>(width), t.size[1] = static_cast<uint64_t>(height);
  t.stride[0] = static_cast<uint64_t>(width) * 2;
  t.box[0] = static_cast<uint32_t>(columns), t.box[1] = static_cast<uint32_t>(rows);
  t.swizzle = Swizzle{swizzle};
  const int bytes = rows * columns * 2;
  launch<box_kernel>({dim3(1), 32, 0, static_cast<std::size_t>(bytes)}, tensor_map(t), out, bytes, c0, c1);
}

// Each float as f16 and as bf16, and each of the 65536 f16 as a float.
ENTRY layout_round(const float* in, int count, uint16_t* half, uint16_t* brain, float* wide) {
  for (int i = 0; i < count; i++) half[i] = from_float<f16>(in[i]).bits, brain[i] = from_float<bf16>(in[i]).bits;
  for (int i = 0; i < 65536; i++) wide[i] = to_float(f16{static_cast<uint16_t>(i)});
}

// Which trials there are, one a line.
extern "C" __attribute__((visibility("default"))) const char* trial_names() {
  static std::string names;
  names.clear();
  for (const auto& [name, trial] : all()) names += name + "\n";
  return names.c_str();
}

// 0: right, 1: wrong, 2: refused, with the reason.
extern "C" __attribute__((visibility("default"))) int trial_run(const char* name, int broken, uint64_t seed,
                                                                int early_copies, char* reason, int room) {
  host_gpu::settings().seed = seed;
  host_gpu::settings().early_copies = early_copies != 0;
  try {
    return all().at(name)(broken != 0) ? 0 : 1;
  } catch (const std::exception& error) {
    std::strncpy(reason, error.what(), static_cast<std::size_t>(room) - 1);
    return 2;
  }
}
