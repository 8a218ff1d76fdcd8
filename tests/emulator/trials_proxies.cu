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
  A_WRITTEN,  // in registers that a product since the fence reads
  BY_TWO,     // no fault: element by element, again and again, of each four one by the second thread
  SECOND_NOT_FENCED,
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
    if (FAULT == BY_TWO || FAULT == SECOND_NOT_FENCED) {
      constexpr int ALL = 2 * SIDE * DEPTH;
      for (int k = 0; k < 3 * ALL && me < 2; k++) {
        const int i = k * 617 % ALL, matrix = i / (SIDE * DEPTH), at = i % (SIDE * DEPTH);
        if ((i % 4 == 3) == (me == 1))
          store_pack(memory + OUT + matrix * TILE + swizzled(static_cast<uint32_t>(at * 2), Swizzle::B32),
                     load_pack<Pack<bf16, 1>>(matrix ? b + at : a + (row * DEPTH + at)));
      }
      sync_block();
      if (FAULT == BY_TWO || me != 1) async_fence();
    }
    for (int half = 0; half < 2 && FAULT != BY_TWO && FAULT != SECOND_NOT_FENCED; half++)
      store_pack(memory + OUT + me / SIDE * TILE +
                     swizzled(static_cast<uint32_t>(me % SIDE * DEPTH * 2 + half * 16), Swizzle::B32),
                 load_pack<Pack<bf16, 8>>(from + half * 8));
    if (FAULT != NOT_FENCED && FAULT != FENCED_FIRST && FAULT != SECOND_NOT_FENCED &&
        (FAULT != FENCED_BY_ONE || me == 0))
      async_fence();
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

// out (64, 64) = 2 a (64, 16) b (64, 16)^T: two products of the same registers, some of them NaN.
template <int FAULT>
__global__ void __launch_bounds__(THREADS) registers_kernel(const bf16* a, const bf16* b, float* out) {
  OM_SHARED_DYNAMIC(memory);
  const int me = static_cast<int>(threadIdx.x);
  for (int half = 0; half < 2 && me < SIDE; half++)
    store_pack(memory + swizzled(static_cast<uint32_t>(me * DEPTH * 2 + half * 16), Swizzle::B32),
               load_pack<Pack<bf16, 8>>(b + me * DEPTH + half * 8));
  async_fence();
  sync_block();
  uint32_t mine[4];
  for (int i = 0; i < 4; i++) {
    const int row = me / 32 * 16 + me % 32 / 4 + i % 2 * 8, column = me % 4 * 2 + i / 2 * 8;
    mine[i] = load_pack<Pack<uint32_t, 1>>(a + row * DEPTH + column).value[0];
  }
  const uint64_t descriptor = matrix_descriptor(shared_address(memory), 16, 256, Swizzle::B32);
  float once[SIDE / 2], again[SIDE / 2];
  wgmma_fence();
  wgmma<bf16, SIDE>(once, mine, descriptor, false);
  if (FAULT == A_WRITTEN) mine[0] = 0;
  wgmma<bf16, SIDE>(again, mine, descriptor, false);
  wgmma_commit();
  wgmma_wait<0>();
  hold(once), hold(again);
  for (int i = 0; i < SIDE / 2; i++) out[wgmma_row(me, i) * SIDE + wgmma_column(me, i)] = once[i] + again[i];
}

template <int FAULT>
bool run_registers() {
  constexpr std::size_t N = SIDE, K = DEPTH, LOST = 5;
  Guarded<bf16> a(N * K), b(N * K);
  Guarded<float> out(N * N);
  fill(a, 6), fill(b, 7);
  a[LOST * K + 3].bits = 0x7fc0;
  launch<registers_kernel<FAULT>>({dim3(1), THREADS, 0, TILE}, a.data(), b.data(), out.data());
  bool right = true;
  for (std::size_t i = 0; i < N; i++)
    for (std::size_t j = 0; j < N; j++) {
      float sum = 0.0f;
      for (std::size_t k = 0; k < K; k++) sum += whole(i * K + k, 6) * whole(j * K + k, 7);
      right = right && (i == LOST ? out[i * N + j] != out[i * N + j] : out[i * N + j] == 2.0f * sum);
    }
  return right;
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
const Register at_written("registers_written",
                          [](bool broken) { return broken ? run_registers<A_WRITTEN>() : run_registers<NONE>(); });
const Register at_second("steps_second_not_fenced",
                         [](bool broken) { return broken ? run_steps<SECOND_NOT_FENCED>() : run_steps<BY_TWO>(); });

}  // namespace
}  // namespace trials
