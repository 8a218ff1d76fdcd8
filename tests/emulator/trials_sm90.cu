// Kernels for Hopper, each right, and with one fault when FAULT is not NONE.
#include "harness.h"

namespace trials {
namespace {

enum Fault {
  NONE,
  NO_MBARRIER_WAIT,    // the product starts before its tiles have come
  RELEASED_TOO_EARLY,  // the buffer is given back before wgmma has read it
  NO_WGMMA_WAIT,       // accumulators are read while the product runs
  NOT_COMMITTED,       // the wait does not know of the product
  WRONG_SWIZZLE,       // the copy and the descriptor disagree
  WRONG_BYTES,         // fewer bytes come than were announced
  TOO_MANY_ARRIVALS,
  NO_INIT,
  NO_PUBLISH,  // bulk copies do not see that the barrier was set up
  WRONG_PARITY,
  LAST_TILE_LEFT_OUT,
  SWAPPED_ACCUMULATORS,
  STORE_NOT_WAITED,    // the tile is written again before the store has read it
  STORE_NOT_FENCED,    // nor is what the threads wrote there for it, nor for the load over it
  STORE_TURNED_EARLY,  // by others, before the one that waits for the store has said so
  STORE_LEFT_AT_END,   // the block ends while the store reads its shared memory
  STORE_HALF_WAITED,   // what it writes is read when it has only read
  STORE_TOO_WIDE,
  NO_CLUSTER_SYNC,     // the other block's barrier is not set up yet
  ENDS_FIRST,          // before the other block has arrived at its barrier
  READER_NOT_COUNTED,  // a slot is filled again when one of its readers has read it, however far the others lag
};

constexpr int STAGES = 2, ROWS = 64, DEPTH = 64;  // a tile is 64 rows of 64: 128 bytes each

// C (64 x 64) = A (64 x k) B (64 x k)^T: warp 4 fetches, warps 0 to 3 multiply.
template <int FAULT>
__global__ void __launch_bounds__(160)
    product_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c, int k) {
  OM_SHARED_DYNAMIC(tiles);
  OM_SHARED(Mbarrier, full, STAGES);
  OM_SHARED(Mbarrier, empty, STAGES);
  constexpr int TILE = ROWS * DEPTH * 2;
  const int steps = k / DEPTH;
  if (threadIdx.x == 0 && FAULT != NO_INIT) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 4);
    }
    if (FAULT != NO_PUBLISH) mbarrier_publish();
  }
  sync_block();
  if (warp_id() == 4) {
    if (lane_id() != 0) return;
    for (int t = 0; t < steps; t++) {
      const int s = t % STAGES;
      if (t >= STAGES) mbarrier_wait(&empty[s], t / STAGES - 1 + (FAULT == WRONG_PARITY));
      mbarrier_arrive_expect(&full[s], 2 * TILE + (FAULT == WRONG_BYTES ? 16 : 0));
      tensor_load(tiles + s * 2 * TILE, a, &full[s], t * DEPTH, 0);
      tensor_load(tiles + (s * 2 + 1) * TILE, b, &full[s], t * DEPTH, 0);
    }
    return;
  }
  float d[ROWS / 2];
  for (int t = 0; t < (FAULT == LAST_TILE_LEFT_OUT ? steps - 1 : steps); t++) {
    const int s = t % STAGES;
    if (FAULT != NO_MBARRIER_WAIT) mbarrier_wait(&full[s], t / STAGES);
    wgmma_fence();
    for (int j = 0; j < DEPTH / 16; j++) {
      const uint32_t at = shared_address(tiles) + static_cast<uint32_t>(s * 2 * TILE + j * 32);
      const Swizzle swizzle = FAULT == WRONG_SWIZZLE ? Swizzle::B64 : Swizzle::B128;
      wgmma<bf16, ROWS>(d, matrix_descriptor(at, 16, 1024, swizzle), matrix_descriptor(at + TILE, 16, 1024, swizzle),
                        t + j > 0);
    }
    if (FAULT != NOT_COMMITTED) wgmma_commit();
    if (FAULT == RELEASED_TOO_EARLY && lane_id() == 0) mbarrier_arrive(&empty[s]);
    if (FAULT != NO_WGMMA_WAIT || t + 1 < steps) wgmma_wait<0>();
    if (FAULT != RELEASED_TOO_EARLY && (lane_id() == 0 || FAULT == TOO_MANY_ARRIVALS)) mbarrier_arrive(&empty[s]);
  }
  hold(d);
  for (int i = 0; i < ROWS / 2; i++) {
    const int from = FAULT == SWAPPED_ACCUMULATORS ? i ^ 1 : i;
    c[wgmma_row(static_cast<int>(threadIdx.x), i) * ROWS + wgmma_column(static_cast<int>(threadIdx.x), i)] = d[from];
  }
}

TensorMap map_of(bf16* data, int rows, int columns, Swizzle swizzle) {
  TensorLayout t;
  t.data = data;
  t.size[0] = static_cast<uint64_t>(columns), t.size[1] = static_cast<uint64_t>(rows);
  t.stride[0] = static_cast<uint64_t>(columns) * 2;
  t.box[0] = DEPTH, t.box[1] = ROWS;
  t.swizzle = swizzle;
  return tensor_map(t);
}

template <int FAULT>
bool run_product() {
  constexpr int K = 384;
  Guarded<bf16> a(ROWS * K), b(ROWS * K);
  Guarded<float> c(ROWS * ROWS);
  fill(a, 1), fill(b, 2);
  const std::size_t bytes = STAGES * 2 * ROWS * DEPTH * 2;
  launch<product_kernel<FAULT>>({dim3(1), 160, 0, bytes}, map_of(a.data(), ROWS, K, Swizzle::B128),
                                map_of(b.data(), ROWS, K, Swizzle::B128), c.data(), K);
  bool right = true;
  for (std::size_t i = 0; i < ROWS; i++)
    for (std::size_t j = 0; j < ROWS; j++) {
      float sum = 0.0f;
      for (std::size_t k = 0; k < K; k++) sum += whole(i * K + k, 1) * whole(j * K + k, 2);
      right = right && c[i * ROWS + j] == sum;
    }
  return right;
}

// Doubles a tensor of 100 rows (no multiple of the box) in boxes through shared memory, one buffer for all.
template <int FAULT>
__global__ void double_kernel(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, int rows) {
  OM_SHARED_DYNAMIC(raw);
  OM_SHARED(Mbarrier, bar, 1);
  auto* tile = reinterpret_cast<bf16*>(raw);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_publish();
  }
  sync_block();
  for (int row = 0, phase = 0; row < rows; row += ROWS, phase++) {
    if (threadIdx.x == 0) {
      if (FAULT != STORE_NOT_WAITED) bulk_wait_read<0>();
      mbarrier_arrive_expect(bar, ROWS * DEPTH * 2);
      tensor_load(tile, in, bar, 0, row, 0);
    }
    mbarrier_wait(bar, phase);
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * DEPTH; i += 64)
      store_pack(tile + i, from_float<bf16>(2.0f * to_float(tile[i])));
    if (FAULT != STORE_NOT_FENCED) async_fence();
    sync_block();
    if (threadIdx.x == 0) {
      tensor_store(out, tile, FAULT == STORE_TOO_WIDE ? 8 : 0, row, 0);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait_read<0>();
}

TensorMap map_3d(bf16* data, int rows) {
  TensorLayout t;
  t.data = data;
  t.rank = 3;
  t.size[0] = DEPTH, t.size[1] = static_cast<uint64_t>(rows);
  t.stride[0] = DEPTH * 2, t.stride[1] = static_cast<uint64_t>(rows) * DEPTH * 2;
  t.box[0] = DEPTH, t.box[1] = ROWS;
  return tensor_map(t);
}

template <int FAULT>
bool run_double() {
  constexpr int N = 300;
  Guarded<bf16> in(N * DEPTH), out(N * DEPTH);
  fill(in, 3);
  launch<double_kernel<FAULT>>({dim3(1), 64, 0, ROWS * DEPTH * 2}, map_3d(in.data(), N), map_3d(out.data(), N), N);
  bool right = true;
  for (std::size_t i = 0; i < N * DEPTH; i++) right = right && wide(out[i]) == 2.0f * wide(in[i]);
  return right;
}

// Numbers a tensor's boxes, one buffer for all, and adds up what has been written.
template <int FAULT>
__global__ void number_kernel(const __grid_constant__ TensorMap out, const bf16* written, float* sums, int rows) {
  OM_SHARED_DYNAMIC(raw);
  auto* tile = reinterpret_cast<bf16*>(raw);
  const int me = static_cast<int>(threadIdx.x);
  for (int row = 0; row < rows; row += ROWS) {
    if (me == 0) bulk_wait_read<0>();
    if (FAULT != STORE_TURNED_EARLY) sync_block();
    for (int i = me; i < ROWS * DEPTH; i += 64)
      store_pack(tile + i, from_float<bf16>(static_cast<float>(row / ROWS + i % 7)));
    async_fence();
    sync_block();
    if (me == 0) {
      tensor_store(out, tile, 0, row, 0);
      bulk_commit();
    }
  }
  if (me == 0 && FAULT != STORE_LEFT_AT_END) FAULT == STORE_HALF_WAITED ? bulk_wait_read<0>() : bulk_wait<0>();
  sync_block();
  float sum = 0.0f;
  if (FAULT != STORE_LEFT_AT_END)
    for (int row = 0; row < rows; row++) sum += to_float(written[row * DEPTH + me]);
  sums[me] = sum;
}

template <int FAULT>
bool run_number() {
  constexpr int N = 4 * ROWS;
  Guarded<bf16> out(N * DEPTH);
  Guarded<float> sums(DEPTH);
  launch<number_kernel<FAULT>>({dim3(1), DEPTH, 0, ROWS * DEPTH * 2}, map_3d(out.data(), N), out.data(), sums.data(),
                               N);
  bool right = true;
  for (std::size_t column = 0; column < DEPTH; column++) {
    float sum = 0.0f;
    for (std::size_t row = 0; row < N; row++) {
      const auto wanted = static_cast<float>(row / ROWS + (row % ROWS * DEPTH + column) % 7);
      right = right && wide(out[row * DEPTH + column]) == wanted;
      sum += wanted;
    }
    right = right && (FAULT == STORE_LEFT_AT_END || sums[column] == sum);
  }
  return right;
}

// Warp 0 fills a ring of slots, the others each read all of them.
template <int FAULT>
__global__ void ring_kernel(const float* in, float* out, int items) {
  constexpr int SLOTS = 4, READERS = 4;
  OM_SHARED(float, ring, SLOTS* WARP);
  OM_SHARED(Mbarrier, full, SLOTS);
  OM_SHARED(Mbarrier, empty, SLOTS);
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], FAULT == READER_NOT_COUNTED ? 1 : READERS);
    }
    mbarrier_publish();
  }
  sync_block();
  for (int i = 0; i < items; i++) {
    const int s = i % SLOTS;
    if (warp_id() == 0) {
      if (i >= SLOTS) mbarrier_wait(&empty[s], i / SLOTS - 1);
      ring[s * WARP + lane_id()] = in[i * WARP + lane_id()];
    } else {
      mbarrier_wait(&full[s], i / SLOTS);
      out[(i * READERS + warp_id() - 1) * WARP + lane_id()] = ring[s * WARP + lane_id()];
    }
    sync_warp();
    const bool counted = warp_id() <= 1 || FAULT != READER_NOT_COUNTED;
    if (lane_id() == 0 && counted) mbarrier_arrive(warp_id() == 0 ? &full[s] : &empty[s]);
  }
}

template <int FAULT>
bool run_ring() {
  constexpr int ITEMS = 40, READERS = 4;
  Guarded<float> in(ITEMS * WARP), out(ITEMS * READERS * WARP);
  fill(in, 5);
  launch<ring_kernel<FAULT>>({dim3(1), (1 + READERS) * WARP}, in.data(), out.data(), ITEMS);
  bool right = true;
  for (std::size_t i = 0; i < out.size(); i++) right = right && out[i] == in[i / (READERS * WARP) * WARP + i % WARP];
  return right;
}

// Two blocks: the first fetches one box for both; each tells the other that it has read it.
template <int FAULT>
__global__ void share_kernel(const __grid_constant__ TensorMap in, bf16* out) {
  OM_SHARED_DYNAMIC(raw);
  OM_SHARED(Mbarrier, bar, 1);
  OM_SHARED(Mbarrier, read, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    mbarrier_init(read, 1);
    mbarrier_publish();
    mbarrier_arrive_expect(bar, ROWS * DEPTH * 2);
  }
  if (FAULT != NO_CLUSTER_SYNC) cluster_sync();
  if (cluster_rank() == 0 && threadIdx.x == 0) tensor_load_to(3, raw, in, bar, 0, 0, 0);
  sync_block();
  mbarrier_wait(bar, 0);
  const auto* tile = reinterpret_cast<const bf16*>(raw);
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * DEPTH; i += 32)
    out[static_cast<int>(blockIdx.x) * ROWS * DEPTH + i] = tile[i];
  if (threadIdx.x == 0) mbarrier_arrive_at(read, 1 - cluster_rank());
  if (FAULT != ENDS_FIRST) cluster_sync();
}

template <int FAULT>
bool run_share() {
  Guarded<bf16> in(ROWS * DEPTH), out(2 * ROWS * DEPTH);
  fill(in, 4);
  launch<share_kernel<FAULT>>({dim3(2), 32, 0, ROWS * DEPTH * 2, 2}, map_3d(in.data(), ROWS), out.data());
  return std::memcmp(in.data(), out.data(), ROWS * DEPTH * 2) == 0 &&
         std::memcmp(in.data(), out.data() + ROWS * DEPTH, ROWS * DEPTH * 2) == 0;
}

#define TRIAL(name, run, fault) \
  const Register at_##name("hopper_" #name, [](bool broken) { return broken ? run<fault>() : run<NONE>(); })

TRIAL(no_mbarrier_wait, run_product, NO_MBARRIER_WAIT);
TRIAL(released_too_early, run_product, RELEASED_TOO_EARLY);
TRIAL(no_wgmma_wait, run_product, NO_WGMMA_WAIT);
TRIAL(not_committed, run_product, NOT_COMMITTED);
TRIAL(wrong_swizzle, run_product, WRONG_SWIZZLE);
TRIAL(wrong_bytes, run_product, WRONG_BYTES);
TRIAL(too_many_arrivals, run_product, TOO_MANY_ARRIVALS);
TRIAL(no_init, run_product, NO_INIT);
TRIAL(no_publish, run_product, NO_PUBLISH);
TRIAL(wrong_parity, run_product, WRONG_PARITY);
TRIAL(last_tile_left_out, run_product, LAST_TILE_LEFT_OUT);
TRIAL(swapped_accumulators, run_product, SWAPPED_ACCUMULATORS);
TRIAL(store_not_waited, run_double, STORE_NOT_WAITED);
TRIAL(store_not_fenced, run_double, STORE_NOT_FENCED);
TRIAL(store_too_wide, run_double, STORE_TOO_WIDE);
TRIAL(store_turned_early, run_number, STORE_TURNED_EARLY);
TRIAL(store_left_at_end, run_number, STORE_LEFT_AT_END);
TRIAL(store_half_waited, run_number, STORE_HALF_WAITED);
TRIAL(reader_not_counted, run_ring, READER_NOT_COUNTED);
TRIAL(no_cluster_sync, run_share, NO_CLUSTER_SYNC);
TRIAL(ends_first, run_share, ENDS_FIRST);

}  // namespace
}  // namespace trials
