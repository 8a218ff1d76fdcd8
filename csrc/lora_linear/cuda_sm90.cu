// The matrix products of the LoRA linear layer on Hopper, from operands of one 16-bit type:
//
//   c[i, j] = sum_k a[i, k] b[k, j] + bias[j] + sum_r low[i, r] up[r, j]          (dropout on the last term: gpu.h)
//
// Shapes: a (m, k) and b (k, n), each contiguous along k or along its other dimension, its other stride and its address
//   multiples of 16 bytes; c (m, n). Any sizes: what a copy reads beyond a tensor is zero.
// Plan: blocks stay and walk over the tiles of c, 128 x 256 each; two blocks of a cluster hold tiles above one another, and each
//   fetches half of the strip of b that both need. A block is three warpgroups:
//   - one thread of the first fetches, in bulk copies that arrive at a barrier, 64 of the depth at a time (48 KB) into a ring
//     of four stages, and runs ahead into the next tile while this one is written;
//   - three warps of it meanwhile lay out the adapters' operands for the end of the tile: low as two bfloat16 parts, 16
//     bits of it, and up as one or, of another type, two: 32 ranks at a time (32 KB);
//   - the two others own 64 x 256 of c each, in 128 registers a thread, and multiply with wgmma straight from the ring, one
//     stage in flight while the next one is awaited, then the adapters' part into the same accumulators. Four lanes then
//     exchange what they hold, so that each writes 16 bytes of c.
//   A last column of which at most 64 columns exist takes products of 64, a warpgroup without rows only passes stages on, and
//   such tiles come last: so the 8512 columns of a projection cost 33 1/4 tiles and not 34, and the last round of blocks
//   is a short one.
// Shared memory: 4 x 48 KB + 32 KB + barriers = 224.1 KB, one block a multiprocessor.
// Traffic: a once for every 256 columns, b once for every 256 rows, mostly from L2 (32 KB for 2 x 128 x 256 x 64 operations);
//   c once.
#include "../common/math.cuh"
#include "feed_sm90.cuh"

namespace omnimamba {
namespace {

using namespace sm90;

// ---- the warpgroups that multiply ----

// One of the 64 x 16 or 16 x N that lie in a stage: `at` is where its rows begin, `k` counts 16s of the depth.
template <bool MN_MAJOR>
OM_DEVICE uint64_t in_stage(uint32_t at, int k) {
  return MN_MAJOR ? matrix_descriptor(at + static_cast<uint32_t>(k) * 2048, BOX, 1024, Swizzle::B128)
                  : matrix_descriptor(at + static_cast<uint32_t>(k) * 32, 16, 1024, Swizzle::B128);
}
OM_DEVICE uint64_t in_low(uint32_t at, int k) {
  return matrix_descriptor(at + static_cast<uint32_t>(k) * 32, 16, 512, Swizzle::B64);
}

// Where a multiplying thread is in the rings.
struct Progress {
  uint32_t ring, low;  // shared addresses
  Barriers& bar;
  int group;  // of the two
  int step = 0, pass = 0;

  // A stage has been read: both blocks must know before either overwrites its half of b.
  OM_DEVICE void release(int which) {
    if (lane_id() < CLUSTER) mbarrier_arrive_at(&bar.empty[which % STAGES], lane_id());
  }
  OM_DEVICE void await_low() { mbarrier_wait(&bar.low_full, pass++ & 1); }
  OM_DEVICE void release_low() {
    if (lane_id() == 0) mbarrier_arrive(&bar.low_empty);
  }
};

// term (64 x WIDTH) = low up for the ranks at hand, or added to it where `add`; `up`: the first of its columns.
template <int WIDTH>
OM_DEVICE void multiply_low(float (&term)[WIDTH / 2], uint32_t low, uint32_t up, int products, bool add) {
  wgmma_fence();
#pragma unroll 1
  for (int k = 0; k < products; k++)
#pragma unroll
    for (uint32_t part = 0; part < 2; part++)
      wgmma<bf16, WIDTH>(term, in_low(low + part * PART, k), in_low(up, k), add || k + part > 0);
  wgmma_commit();
  wgmma_wait<0>();
  hold(term);
}

// acc += low up. Nothing is in flight before it, nor after it.
template <int WIDTH>
OM_DEVICE void add_low(float (&acc)[WIDTH / 2], const LoraMatmulParams& p, Progress& at, int row, int column) {
  const Passes passes(p);
  const uint32_t low = at.low + static_cast<uint32_t>(at.group) * 64 * RANKS * 2, up = at.low + 2 * PART;
  if (!p.dropout || passes.count == 0) {
#pragma unroll 1
    for (int pass = 0; pass < passes.count; pass++) {
      at.await_low();
      multiply_low<WIDTH>(acc, low, up, passes.products(pass), true);
      at.release_low();
    }
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % GROUP;
  const float scale = reciprocal(p.keep);
  at.await_low();  // the only time
#pragma unroll
  for (int slice = 0; slice < WIDTH / 64; slice++) {
    float term[32];
    multiply_low<64>(term, low, up + static_cast<uint32_t>(slice) * 64 * RANKS * 2, passes.products(0), false);
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (kept(p, row + wgmma_row(thread, i), column + slice * 64 + wgmma_column(thread, i), p.n))
        acc[slice * 32 + i] += term[i] * scale;
  }
  at.release_low();
}

// Of each lane's four words, one for each of four neighbours of 8 columns, and those of its three neighbours: all of one.
OM_DEVICE void exchange(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane_id() & bit;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j & bit) continue;
      const uint32_t got = shuffle_xor(upper ? w[j] : w[j | bit], bit);
      w[j] = upper ? got : w[j];
      w[j | bit] = upper ? w[j | bit] : got;
    }
  }
}

OM_DEVICE float bias_at(const LoraMatmulParams& p, int x) { return p.bias && x < p.n ? float_at(p.bias, x) : 0.0f; }

// Rows of whole packs: 16 bytes a lane, 64 of a row by four lanes.
template <class TC, int WIDTH>
OM_DEVICE void store_packs(const float (&acc)[WIDTH / 2], const LoraMatmulParams& p, int row, int column) {
  const int thread = static_cast<int>(threadIdx.x) % GROUP;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i += 16) {  // 32 columns
    float bias[8];
#pragma unroll
    for (int j = 0; j < 8; j++) bias[j] = bias_at(p, column + wgmma_column(thread, i + j / 2 * 4 + j % 2));
#pragma unroll
    for (int h = 0; h < 4; h += 2) {  // two rows
      Pack<uint32_t, 4> words;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float* from = acc + i + 4 * j + h;
        words.value[j] = pack_two<TC>(from[0] + bias[2 * j], from[1] + bias[2 * j + 1]);
      }
      exchange(words.value);
      const int y = row + wgmma_row(thread, h), x = column + wgmma_column(0, i) + thread % 4 * 8;
      if (y < p.m && x < p.n) store_pack(reinterpret_cast<uint32_t*>(p.c.at<TC>(y, x)), words);
    }
  }
}

// Any rows: two neighbours a lane, in one access where that is aligned.
template <class TC, int WIDTH>
OM_DEVICE void store_pairs(const float (&acc)[WIDTH / 2], const LoraMatmulParams& p, int row, int column) {
  const int thread = static_cast<int>(threadIdx.x) % GROUP;
  const bool aligned = p.n % 2 == 0;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i += 2) {
    const int y = row + wgmma_row(thread, i), x = column + wgmma_column(thread, i);
    if (y >= p.m || x >= p.n) continue;
    TC* to = p.c.at<TC>(y, x);
    const float both[2] = {acc[i] + bias_at(p, x), acc[i + 1] + bias_at(p, x + 1)};
    if (aligned) {
      store_floats(to, both);
    } else {
      store_pack(to, from_float<TC>(both[0]));
      if (x + 1 < p.n) store_pack(to + 1, from_float<TC>(both[1]));
    }
  }
}

// 64 x WIDTH of c, from the next stages of the ring on.
template <class T, bool A_MN, bool B_MN, int WIDTH>
OM_DEVICE void make_tile(const LoraMatmulParams& p, Progress& at, int row, int column) {
  const int depth = static_cast<int>(p.k);
  float acc[WIDTH / 2] = {};
#pragma unroll 1
  for (int k = 0; k < depth; k += DEPTH, at.step++) {
    const int s = at.step % STAGES;
    mbarrier_wait(&at.bar.full[s], at.step / STAGES & 1);
    const uint32_t stage = at.ring + static_cast<uint32_t>(s * STAGE);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++)
      wgmma<T, WIDTH, A_MN, B_MN>(acc, in_stage<A_MN>(stage + static_cast<uint32_t>(at.group * BOX), i),
                                  in_stage<B_MN>(stage + BYTES_A, i), true);
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0) at.release(at.step - 1);
  }
  wgmma_wait<0>();
  hold(acc);
  at.release(at.step - 1);
  add_low<WIDTH>(acc, p, at, row, column);
  if (p.c.dtype == DType::F32)
    store_pairs<float, WIDTH>(acc, p, row, column);
  else if (p.n % 8 == 0)
    store_packs<T, WIDTH>(acc, p, row, column);
  else
    store_pairs<T, WIDTH>(acc, p, row, column);
}

// A tile without rows: the stages are for the others. No lane may still wait for a phase when the next but one can come.
OM_DEVICE void pass_on(const LoraMatmulParams& p, Progress& at) {
  const int depth = static_cast<int>(p.k);
#pragma unroll 1
  for (int k = 0; k < depth; k += DEPTH, at.step++) {
    mbarrier_wait(&at.bar.full[at.step % STAGES], at.step / STAGES & 1);
    sync_warp();
    at.release(at.step);
  }
#pragma unroll 1
  for (int pass = Passes(p).count; pass > 0; pass--) {
    at.await_low();
    sync_warp();
    at.release_low();
  }
}

template <class T, bool A_MN, bool B_MN>
__global__ void __launch_bounds__(THREADS, 1)
    matmul_sm90_kernel(const __grid_constant__ LoraMatmulParams p, const __grid_constant__ TensorMap a,
                       const __grid_constant__ TensorMap b) {
  OM_SHARED_DYNAMIC(ring);
  OM_SHARED(Barriers, bar, 1);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&bar->full[s], 1);
      mbarrier_init(&bar->empty[s], CLUSTER * 2 * GROUP / WARP);
    }
    mbarrier_init(&bar->low_full, LOADERS);
    mbarrier_init(&bar->low_empty, 2 * GROUP / WARP);
    mbarrier_publish();
  }
  cluster_sync();  // the other block's barriers are ready, too
  if (warp_id() < GROUP / WARP) {
    give_registers<72>();
    if (warp_id() > 0)
      fill_low(p, ring + STAGES * STAGE, *bar);
    else if (lane_id() == 0)
      fetch<A_MN, B_MN>(p, a, b, ring, *bar);
    sync_warp();
  } else {
    take_registers<216>();
    Progress at{shared_address(ring), shared_address(ring) + STAGES * STAGE, *bar, warp_id() * WARP / GROUP - 1};
    Tiles(p).each([&](int row, int column) {
      row += at.group * 64;
      if (row >= p.m)
        pass_on(p, at);
      else if (p.n - column <= SHORT)
        make_tile<T, A_MN, B_MN, SHORT>(p, at, row, column);
      else
        make_tile<T, A_MN, B_MN, N>(p, at, row, column);
    });
  }
  cluster_sync();  // neither block ends while the other may still write to it
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

// Whether bulk copies can read an operand whose dimension `along`, of that length, is contiguous.
bool copies(const View& v, int along, int64_t length) {
  const int64_t step = v.stride[1 - along];
  return v.stride[along] == 1 && step % 8 == 0 && step >= length && packs(v, 0, 2, 16);
}

// Its map; `rows`: of a box, where the depth is contiguous.
TensorMap map_of(const View& v, int k_dimension, bool mn_major, int64_t k, int64_t mn, int rows) {
  TensorLayout t;
  t.data = v.data;
  t.dtype = v.dtype;
  t.size[0] = static_cast<uint64_t>(mn_major ? mn : k), t.size[1] = static_cast<uint64_t>(mn_major ? k : mn);
  t.stride[0] = static_cast<uint64_t>(v.stride[mn_major ? k_dimension : 1 - k_dimension]) * 2;
  t.box[0] = 64, t.box[1] = static_cast<uint32_t>(mn_major ? DEPTH : rows);
  t.swizzle = Swizzle::B128;
  return tensor_map(t);
}

template <class T, bool A_MN, bool B_MN>
void run(const LoraMatmulParams& p) {
  const int64_t tiles = ceil_div(p.m, CLUSTER * M) * ceil_div(p.n, N), most = p.multiprocessors / CLUSTER;
  const int64_t clusters = tiles < most ? tiles : most < 1 ? 1 : most;
  launch<matmul_sm90_kernel<T, A_MN, B_MN>>({grid(clusters * CLUSTER), THREADS, p.stream, SHARED, CLUSTER}, p,
                                            map_of(p.a, 1, A_MN, p.k, p.m, M), map_of(p.b, 0, B_MN, p.k, p.n, N / 2));
}

}  // namespace

bool matmul_sm90(const LoraMatmulParams& p) {
  constexpr int64_t MOST = 1 << 30;  // coordinates are 32 bits
  const DType type = p.a.dtype;
  if (type == DType::F32 || p.b.dtype != type || (p.c.dtype != type && p.c.dtype != DType::F32)) return false;
  if (p.k == 0 || p.k >= MOST || p.m >= MOST || p.n >= MOST || !packs(p.c, 0, 2, 16)) return false;
  const int64_t tiles = ceil_div(p.m, CLUSTER * M) * CLUSTER * ceil_div(p.n, N);
  if (tiles * 4 < p.multiprocessors) return false;  // smaller tiles keep more of the chip busy
  // With dropout the ranks' part is masked by itself, and has to come at once.
  if (p.low && p.dropout && (p.tasks * p.rank > RANKS || p.up.dtype != DType::BF16)) return false;
  const bool a_k = copies(p.a, 1, p.k), a_m = copies(p.a, 0, p.m);
  const bool b_k = copies(p.b, 0, p.k), b_n = copies(p.b, 1, p.n);
  auto with_type = [&](auto t) {
    using T = decltype(t);
    if (a_k && b_k) return run<T, false, false>(p), true;
    if (a_k && b_n) return run<T, false, true>(p), true;
    if (a_m && b_n) return run<T, true, true>(p), true;
    return false;
  };
  return type == DType::BF16 ? with_type(bf16{}) : with_type(f16{});
}

#endif

}  // namespace omnimamba
