// Kernels whose threads write what wgmma and bulk stores read, each right, and with one fault when FAULT is not NONE.
#include "harness.h"

namespace trials {
namespace {

enum Fault {
  NONE,
  NOT_FENCED,         // what the threads wrote is not there for wgmma
  FENCED_FIRST,       // before they write it
  FENCED_BY_ONE,      // for the other threads' part
  OUTPUT_NOT_FENCED,  // for the bulk store
  REGISTERS_NOT_FENCED,
  LEADER_ALONE,  // has waited for the store; other warps, who wait for their products alone, write its tile
  LEFT_OUT,      // by one warp, of a product of four
  NOT_WAITED_AT_END,
};

constexpr int SIDE = 64, DEPTH = 16, TILE = SIDE * DEPTH * 2, OUT = SIDE * SIDE * 2, THREADS = 128;

// out (blocks, steps, 64, 64) = a (blocks, steps, 64, 16) b (64, 16)^T: all threads write a's and b's tiles, multiply, and
// write out's tile, which the first of them sends away.
template <int FAULT>
__global__ void __launch_bounds__(THREADS)
    steps_kernel(const bf16* a, const bf16* b, const __grid_constant__ TensorMap out, int steps) {
  OM_SHARED_DYNAMIC(memory);
  const int me = static_cast<int>(threadIdx.x);
  for (int step = 0; step < steps; step++) {
    const int row = (static_cast<int>(blockIdx.x) * steps + step) * SIDE;
    const bf16* from = me < SIDE ? a + (row + me) * DEPTH : b + (me - SIDE) * DEPTH;
    if (FAULT == FENCED_FIRST) async_fence();
    for (int half = 0; half < 2; half++)
      store_pack(memory + OUT + me / SIDE * TILE +
                     swizzled(static_cast<uint32_t>(me % SIDE * DEPTH * 2 + half * 16), Swizzle::B32),
                 load_pack<Pack<bf16, 8>>(from + half * 8));
    if (FAULT != NOT_FENCED && FAULT != FENCED_FIRST && (FAULT != FENCED_BY_ONE || me == 0)) async_fence();
    sync_block();
    float d[SIDE / 2];
    if (FAULT != REGISTERS_NOT_FENCED || step == 0) wgmma_fence();
    const uint32_t at = shared_address(memory) + OUT;
    if (FAULT != LEFT_OUT || warp_id() != 3 || step + 1 < steps)
      wgmma<bf16, SIDE>(d, matrix_descriptor(at, 16, 256, Swizzle::B32),
                        matrix_descriptor(at + TILE, 16, 256, Swizzle::B32), false);
    wgmma_commit();
    if (me == 0) bulk_wait_read<0>();
    wgmma_wait<0>();
    hold(d);
    if (FAULT != LEADER_ALONE) sync_block();
    for (int i = 0; i < SIDE / 2; i += 2)
      store_pack(memory + (wgmma_row(me, i) * SIDE + wgmma_column(me, i)) * 2,
                 Pack<uint32_t, 1>{pack_two<bf16>(d[i], d[i + 1])});
    if (FAULT != OUTPUT_NOT_FENCED) async_fence();
    sync_block();
    if (me == 0) {
      tensor_store(out, memory, 0, row, 0);
      bulk_commit();
    }
  }
  if (me == 0) bulk_wait_read<0>();
  if (FAULT != NOT_WAITED_AT_END) return;
  float d[SIDE / 2] = {};
  wgmma_fence();
  wgmma<bf16, SIDE>(d, matrix_descriptor(shared_address(memory) + OUT, 16, 256, Swizzle::B32),
                    matrix_descriptor(shared_address(memory) + OUT, 16, 256, Swizzle::B32), false);
  wgmma_commit();
}

template <int FAULT>
bool run_steps() {
  constexpr std::size_t BLOCKS = 8, EACH = 2, STEPS = BLOCKS * EACH, N = SIDE, K = DEPTH;
  Guarded<bf16> a(STEPS * N * K), b(N * K), out(STEPS * N * N);
  fill(a, 6), fill(b, 7);
  TensorLayout t;
  t.data = out.data();
  t.rank = 3;
  t.size[0] = N, t.size[1] = STEPS * N;
  t.stride[0] = N * 2, t.stride[1] = STEPS * N * N * 2;
  t.box[0] = t.box[1] = SIDE;
  launch<steps_kernel<FAULT>>({dim3(BLOCKS), THREADS, 0, OUT + 2 * TILE}, a.data(), b.data(), tensor_map(t),
                              static_cast<int>(EACH));
  bool right = true;
  for (std::size_t i = 0; i < STEPS * N; i++)
    for (std::size_t j = 0; j < N; j++) {
      float sum = 0.0f;
      for (std::size_t k = 0; k < K; k++) sum += whole(i * K + k, 6) * whole(j * K + k, 7);
      right = right && wide(out[i * N + j]) == sum;
    }
  return right;
}

#define TRIAL(name, fault) \
  const Register at_##name("steps_" #name, [](bool broken) { return broken ? run_steps<fault>() : run_steps<NONE>(); })

TRIAL(not_fenced, NOT_FENCED);
TRIAL(fenced_first, FENCED_FIRST);
TRIAL(fenced_by_one, FENCED_BY_ONE);
TRIAL(output_not_fenced, OUTPUT_NOT_FENCED);
TRIAL(registers_not_fenced, REGISTERS_NOT_FENCED);
TRIAL(leader_alone, LEADER_ALONE);
TRIAL(left_out, LEFT_OUT);
TRIAL(not_waited_at_end, NOT_WAITED_AT_END);

}  // namespace
}  // namespace trials
