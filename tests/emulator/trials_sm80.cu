// Kernels for every chip from sm_80, each right, and with one fault when BROKEN.
#include "harness.h"

namespace trials {
namespace {

constexpr int THREADS = 128;

template <bool BROKEN>
__global__ void reverse_kernel(const float* in, float* out) {
  OM_SHARED(float, tile, THREADS);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!BROKEN) sync_block();
  out[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}

template <bool BROKEN>
__global__ void neighbour_kernel(const float* in, float* out) {
  OM_SHARED(float, tile, THREADS);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!BROKEN) sync_warp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Warps 0 and 1 fill, warps 2 and 3 read, over one named barrier.
template <int FAULT>  // 1: the barrier is left out, 2: it counts a warp that never comes
__global__ void handover_kernel(const float* in, float* out) {
  OM_SHARED(float, tile, 64);
  const int i = static_cast<int>(threadIdx.x) % 64, count = FAULT == 2 ? 160 : 128;
  if (threadIdx.x < 64) {
    tile[i] = in[i];
    if (FAULT != 1) arrive_named(1, count);
  } else if (threadIdx.x < 128) {
    if (FAULT != 1) sync_named(1, count);
    out[i] = tile[i];
  }
}

template <int FAULT>  // 1: half of the lanes do not come, 2: a lane outside the mask is read, 3: another operation
__global__ void shuffle_kernel(const float* in, float* out) {
  float v = in[threadIdx.x];
  const uint32_t mask = FAULT == 2 ? 0xffffu << (lane_id() & 16) : 0xffffffffu;
  if (FAULT == 3 && lane_id() >= 16)
    v = static_cast<float>(omnimamba::ballot(v > 0.0f));
  else if (FAULT != 1 || lane_id() < 16)
    v = shuffle_xor(v, 16, mask);
  out[threadIdx.x] = v;
}

template <bool BROKEN>
__global__ void early_end_kernel(const float* in, float* out) {
  OM_SHARED(float, tile, THREADS);
  if (BROKEN && threadIdx.x >= 96) return;
  tile[threadIdx.x] = in[threadIdx.x];
  sync_block();
  out[threadIdx.x] = tile[threadIdx.x / 32 * 32 + 31 - threadIdx.x % 32];
}

template <bool BROKEN>
__global__ void scale_kernel(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (BROKEN ? i <= n : i < n) out[i] = 2.0f * in[i < n ? i : n - 1];
}

template <bool BROKEN>
__global__ void packs_kernel(const float* in, float* out) {
  float v[4];
  load_floats(v, in + threadIdx.x * 4 + (BROKEN ? 1 : 0));
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + static_cast<unsigned>(i)] = v[i];
}

template <bool BROKEN>
__global__ void overrun_kernel(const float* in, float* out) {
  OM_SHARED(float, tile, THREADS);
  tile[threadIdx.x + (BROKEN ? 1 : 0)] = in[threadIdx.x];
  sync_block();
  out[threadIdx.x] = in[threadIdx.x];
}

// C (16 x 8) = A (16 x k) B (8 x k)^T by one warp, tiles of 16 along k in a ring of STAGES.
template <int FAULT>
__global__ void product_kernel(const bf16* a, const bf16* b, float* c, int k) {
  // 1: no wait, 2: waits for one group too few, 3: copies into a buffer still read, 4: a fragment's halves swapped,
  // 5: the last tile is left out, 6: no sync_warp after the wait
  constexpr int STAGES = 3, WIDTH = 24;  // rows of 48 bytes
  OM_SHARED(bf16, tile_a, STAGES * 16 * WIDTH);
  OM_SHARED(bf16, tile_b, STAGES * 8 * WIDTH);
  const int lane = lane_id(), tiles = k / 16;
  auto fetch = [&](int t) {
    if (t < tiles) {
      const int row = lane / 2, column = lane % 2 * 8, stage = t % STAGES;
      copy_async<16>(tile_a + (stage * 16 + row) * WIDTH + column, a + row * k + t * 16 + column);
      if (row < 8) copy_async<16>(tile_b + (stage * 8 + row) * WIDTH + column, b + row * k + t * 16 + column);
    }
    copy_async_commit();
  };
  float sum[4] = {};
  for (int t = 0; t < STAGES - 1; t++) fetch(t);
  for (int t = 0; t < (FAULT == 5 ? tiles - 1 : tiles); t++) {
    if (FAULT == 3) fetch(t + STAGES);
    if (FAULT == 2) copy_async_wait<STAGES - 1>();
    if (FAULT != 1 && FAULT != 2) copy_async_wait<FAULT == 3 ? STAGES : STAGES - 2>();
    if (FAULT != 6) sync_warp();
    if (FAULT != 3) fetch(t + STAGES - 1);
    const int stage = t % STAGES;
    uint32_t fa[4], fb[2];
    load_matrices<false>(fa, tile_a + (stage * 16 + lane % 16) * WIDTH + lane / 16 * 8);
    load_matrices<false>(fb, tile_b + (stage * 8 + lane % 8) * WIDTH + lane / 8 % 2 * 8);
    if (FAULT == 4) {
      const uint32_t other = fa[1];
      fa[1] = fa[2];
      fa[2] = other;
    }
    mma<bf16>(sum, fa, fb);
    if (FAULT != 6) sync_warp();
  }
  for (int i = 0; i < 4; i++) {
    const Place at = fragment::c(lane, i);
    c[at.row * 8 + at.column] = sum[i];
  }
}

template <int FAULT>
bool run_product() {
  constexpr int K = 96;
  Guarded<bf16> a(16 * K), b(8 * K);
  Guarded<float> c(16 * 8);
  fill(a, 1), fill(b, 2);
  launch<product_kernel<FAULT>>({dim3(1), 32}, a.data(), b.data(), c.data(), K);
  bool right = true;
  for (std::size_t i = 0; i < 16; i++)
    for (std::size_t j = 0; j < 8; j++) {
      float sum = 0.0f;
      for (std::size_t k = 0; k < K; k++) sum += whole(i * K + k, 1) * whole(j * K + k, 2);
      right = right && c[i * 8 + j] == sum;
    }
  return right;
}

// out[i] = in[from(i)] for kernels of THREADS threads.
template <auto KERNEL, class From>
bool run_map(From from, int threads = THREADS) {
  Guarded<float> in(THREADS), out(THREADS);
  fill(in, 1);
  launch<KERNEL>({dim3(1), threads}, in.data(), out.data());
  bool right = true;
  for (std::size_t i = 0; i < THREADS; i++) {
    const int source = from(static_cast<int>(i));
    if (source >= 0) right = right && out[i] == in[static_cast<std::size_t>(source)];
  }
  return right;
}

int mirrored(int i) { return THREADS - 1 - i; }
int beside(int i) { return i ^ 1; }
int same(int i) { return i; }
int half_over(int i) { return i ^ 16; }
int warp_mirrored(int i) { return i / 32 * 32 + 31 - i % 32; }
int first_64(int i) { return i < 64 ? i : -1; }

template <bool BROKEN>
bool run_scale() {
  constexpr int N = 300;
  Guarded<float> in(N), out(N);
  fill(in, 1);
  launch<scale_kernel<BROKEN>>({dim3(3), 128}, in.data(), out.data(), N);
  bool right = true;
  for (std::size_t i = 0; i < N; i++) right = right && out[i] == 2.0f * in[i];
  return right;
}

template <bool BROKEN>
bool run_packs() {
  alignas(16) float in[THREADS * 4 + 4], out[THREADS * 4];
  for (std::size_t i = 0; i < THREADS * 4 + 4; i++) in[i] = whole(i, 1);
  launch<packs_kernel<BROKEN>>({dim3(1), THREADS}, in, out);
  return std::memcmp(in, out, sizeof out) == 0;
}

#define TRIAL(name, whole_run, broken_run) \
  const Register at_##name(#name, [](bool broken) { return broken ? (broken_run) : (whole_run); })

#ifdef OMNIMAMBA_EMULATED
// The whole of a block's shared memory, and `beyond` bytes more.
__global__ void room_kernel(std::size_t bytes, int* out) {
  OM_SHARED_DYNAMIC(memory);
  memory[bytes - 1] = 7;
  *out = memory[bytes - 1];
}

bool run_room(std::size_t beyond) {
  const std::size_t bytes = host_gpu::most_shared() + beyond;
  Guarded<int> out(1);
  launch<room_kernel>({grid(1), WARP, 0, bytes}, bytes, out.data());
  return out[0] == 7;
}
TRIAL(more_than_the_chip, run_room(0), run_room(1));
#endif

TRIAL(missing_barrier, run_map<reverse_kernel<false>>(mirrored), run_map<reverse_kernel<true>>(mirrored));
TRIAL(missing_sync_warp, run_map<neighbour_kernel<false>>(beside), run_map<neighbour_kernel<true>>(beside));
TRIAL(missing_named_barrier, run_map<handover_kernel<0>>(first_64), run_map<handover_kernel<1>>(first_64));
TRIAL(named_barrier_never_full, run_map<handover_kernel<0>>(first_64, 192), run_map<handover_kernel<2>>(first_64, 192));
TRIAL(divergent_shuffle, run_map<shuffle_kernel<0>>(half_over), run_map<shuffle_kernel<1>>(half_over));
TRIAL(lane_outside_the_mask, run_map<shuffle_kernel<0>>(half_over), run_map<shuffle_kernel<2>>(half_over));
TRIAL(two_operations_at_once, run_map<shuffle_kernel<0>>(half_over), run_map<shuffle_kernel<3>>(half_over));
TRIAL(ended_before_the_barrier, run_map<early_end_kernel<false>>(warp_mirrored),
      run_map<early_end_kernel<true>>(warp_mirrored));
TRIAL(store_out_of_bounds, run_scale<false>(), run_scale<true>());
TRIAL(misaligned_pack, run_packs<false>(), run_packs<true>());
TRIAL(shared_overrun, run_map<overrun_kernel<false>>(same), run_map<overrun_kernel<true>>(same));
TRIAL(unwaited_copy, run_product<0>(), run_product<1>());
TRIAL(waited_for_one_too_few, run_product<0>(), run_product<2>());
TRIAL(copied_over_what_is_read, run_product<0>(), run_product<3>());
TRIAL(wrong_fragment_index, run_product<0>(), run_product<4>());
TRIAL(one_tile_too_few, run_product<0>(), run_product<5>());
TRIAL(copies_of_other_lanes, run_product<0>(), run_product<6>());

}  // namespace
}  // namespace trials
