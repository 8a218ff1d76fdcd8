// Mamba-2's scan on Hopper (sm_90a): the walk of cuda.cu with products of warpgroups (wgmma), bulk copies (TMA) and warps of
// three kinds. The maths is in ssd_scan.h, the terms in chunk.cuh. For a chunk of 64 positions, transposed, with S (p, n) the
// state before it:
//
//   y^T = (S C^T) carry + x^T M^T + D x^T,   M_ts = (C B^T)_ts L_ts dt_s,   out = y silu(z)
//   S  <- carry_end S + (weight x)^T B
//
// Shapes. bf16 x, z, y (b, l, h, p), B, C (b, l, g, n); p from 32 in eights, n from 18 to 256, even; the rest as in ssd_scan.h.
//   Tiles are 64 wide: bulk copies fill up with zeros and cut off what is past the end. Other calls, and strides that bulk
//   copies do not take (suits_bulk), go to cuda.cu.
// Plan. A block has two of: 64 channels of a head with 128 of their states: two heads of a group, or two halves of a head of
//   128 channels, or the two halves of 256 states. It walks a segment of the sequence. Its warpgroups:
//     fetch    one thread issues the copies of chunks to come, as far as stages are free; one warp clears padding's rows
//     score    C B^T once for both heads, then M of each, a chunk ahead of the walkers: exponentials run beside their
//              products. Decays reach from position s to t over an anchor, the end of the 16 positions before t's:
//              2^(cum_t - anchor) 2^(anchor - cum_s): 2 exponentials for 4 scores; within the 16 they are taken one by one
//     walkers  one each of the two. S stays in a walker's registers in float32. S C^T reads it as bf16 from registers,
//              x^T M^T and (weight x)^T B read x from registers, so that of what was computed only M passes through shared
//              memory. While one walker sends out y, the other multiplies: what a chunk adds to S needs as many registers
//              as S, which y has until then.
//   Nothing in a block waits for all of it: stages and scores are handed over by mbarriers.
// Launches: the steps; the ends of segments and of packed sequences (cuda_ends.cu), where there are any; this walk. Segments
//   are as many as fill the chip, seeded by what the earlier ones left. No block waits for another.
// Budget, n 128, two heads of p 64: a stage 52224 bytes (B, C, x 16384 each, steps 3072), three of them; M 4 x 8192; y 2 x
//   8192: 205824 of 232448. With z two stages of 68608, 186368. n 64: 156672. n 256, one head: two stages, 192512.
//   Registers a thread: fetch 24, score 88, walkers 200 (S 64; S as bf16 32, y 32, x 16; or what is added to S 64, weight x
//   in three terms 12 for 16 positions).
// Traffic a position and head at p 64, n 128, 64 heads: x read once and y written once, 256 bytes; steps 20 written and 20
//   read; B and C from L2, 512 shared by two heads, 8 of HBM: 304 of HBM, 404 read from L2. `states` adds 512, z 128,
//   `ungated` 128.
// Arithmetic a chunk and head there: 1280 clocks of a multiprocessor's matrix units (256 S C^T, 128 x^T M^T, 128 C B^T, 768
//   for S, whose three terms keep float32's digits). Predicted, never run on a GPU: 8 x 2048 positions, 64 heads: two waves
//   of blocks, 93 us of products at 1.755 GHz, beside 75 us of HBM and 71 us of L2: 95 to 125 us where both walkers of a
//   block keep its matrix units busy between them; 1 x 2048: four segments, 20 to 30 us. A block with one walker waits
//   while that one sends out y, and takes longer by as much.
// Precision: as in cuda.cu.
#include "../common/device.h"
#include "hopper_feed.cuh"
#include "hopper_maps.h"

namespace omnimamba {
namespace ssd {
namespace {

constexpr int FETCH_REGISTERS = 24, SCORE_REGISTERS = 88, WALK_REGISTERS = 200;
static_assert((FETCH_REGISTERS + SCORE_REGISTERS + MOST_WALKERS * WALK_REGISTERS) * TEAM <= 65536);

// y^T += D x^T, of 16 positions.
OM_DEVICE void add_skip(float (&y)[8], const SsdScanParams& q, const Seat& at, const Block<bf16>& x) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int channel = at.p0 + state_row(2 * half);
    const float D = channel < q.headdim ? *q.D.at<float>(at.h, channel) : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i / 2 % 2 == half) y[i] += D * x.value(i);
  }
}

// y^T of a warp on its way out, through the gate: to the walker's tile, and from there to memory as one bulk copy.
template <int N>
OM_DEVICE void store_outputs(const Walk<N>& walk, const float (&y)[SIDE / 2], int chunk, int slot) {
  const SsdScanParams& q = walk.q;
  const int own = warp_id() % COLUMNS * 16, row = lane_id() % 8 + lane_id() / 16 * 8, further = lane_id() / 8 % 2 * 8;
  unsigned char *out = walk.memory + walk.layout.output + slot * TILE_BYTES, *stage = walk.stage(chunk);
  unsigned char* ungated = walk.memory + walk.layout.ungated + slot * TILE_BYTES;
  const Rows<bf16, SIDE> x = rows_of(stage + walk.layout.x + slot * TILE_BYTES);
  const Rows<bf16, SIDE> z = rows_of(stage + walk.layout.z + slot * TILE_BYTES);
  const bool leader = threadIdx.x % TEAM == 0;
  if (leader) bulk_wait_read<0>();
  sync_named(1 + slot, TEAM);  // what the last chunk left there has gone
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    const uint64_t used = q.seq_idx ? used_bits<bf16>(q, walk.at.b, chunk) >> (16 * k) : ~uint64_t{0};
    auto put = [&](unsigned char* tile, const float (&v)[8]) {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; i++) pair[i] = pack_two<bf16>(v[2 * i], v[2 * i + 1]);
      store_matrices<true>(rows_of(tile).at(16 * k + row, own, further), pair);
    };
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = y[8 * k + i];
    if (q.D) add_skip(v, q, walk.at, load_block<true>(x, 16 * k, own));
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (!(used >> block_column(i) & 1)) v[i] = 0.0f;
    if (q.ungated) put(ungated, v);
    if (q.z) {
      const Block<bf16> gate = load_block<true>(z, 16 * k, own);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (used >> block_column(i) & 1) v[i] *= silu(gate.value(i));
    }
    put(out, v);
  }
  async_fence();
  sync_named(1 + slot, TEAM);
  if (leader) {
    const auto b = static_cast<int>(walk.at.b), h = static_cast<int>(walk.at.h), apart = walk.maps.heads_apart;
    const int p0 = h * apart + walk.at.p0, own_head = apart ? 0 : h;
    tensor_store(walk.maps.y, out, p0, own_head, chunk * SIDE, b);
    if (q.ungated) tensor_store(walk.maps.ungated, ungated, p0, own_head, chunk * SIDE, b);
    bulk_commit();
  }
  sync_warp();  // the next product wants its lanes together
}

// The second part's y joins the first's. Only the first's counts from here on; the code is one, so that the compiler sees no
// branch that changes accumulators while products run.
template <int N>
OM_DEVICE void join_parts(const Walk<N>& walk, float (&y)[SIDE / 2], int chunk) {
  constexpr int FULL = 1 + MOST_WALKERS, FREE = FULL + 1;
  float* partial = reinterpret_cast<float*>(walk.memory + walk.layout.partial) + threadIdx.x % TEAM;
  const bool second = walk.at.part == 1;
  if (second) {
    if (chunk > walk.first) sync_named(FREE, 2 * TEAM);
#pragma unroll
    for (int i = 0; i < SIDE / 2; i++) partial[i * TEAM] = y[i];
    arrive_named(FULL, 2 * TEAM);
  } else {
    sync_named(FULL, 2 * TEAM);
  }
#pragma unroll
  for (int i = 0; i < SIDE / 2; i++) y[i] += second ? 0.0f : partial[i * TEAM];
  if (!second && chunk + 1 < walk.last) arrive_named(FREE, 2 * TEAM);
}

// S of a walker to a contiguous (p, n), n even: what is apart from two addresses is known to the compiler.
template <int N>
OM_DEVICE void put_state(const float (&S)[OWN<N> / 2], const SsdScanParams& q, const Seat& at, float* to) {
  const int row = at.p0 + state_row(0), column = at.part * OWN<N> + state_column(0);
  const auto width = static_cast<int>(q.state), rows = static_cast<int>(q.headdim);
  const int left = width - column;
  float *first = to + (row * width + column), *second = first + 8 * width;
  const bool here[2] = {row < rows, row + 8 < rows};
#pragma unroll
  for (int j = 0; j < OWN<N> / 8; j++) {
    if (8 * j >= left) break;
    if (here[0]) store_pack(first + 8 * j, Pack<float, 2>{S[4 * j], S[4 * j + 1]});
    if (here[1]) store_pack(second + 8 * j, Pack<float, 2>{S[4 * j + 2], S[4 * j + 3]});
  }
}

// What a chunk adds to S: (weight x)^T B. It is summed apart from S, which is often larger and would round it at every step,
// and its least terms first.
template <int N>
OM_DEVICE void gain(float (&sum)[OWN<N> / 2], const Rows<bf16, SIDE>& x, const float* weight, const unsigned char* B,
                    int own) {
  constexpr int OWNED = OWN<N>;
  auto weigh = [&](float (&v)[8], int k) {
    const Block<bf16> block = load_block<true>(x, 16 * k, own);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = scaled(block.value(i), weight[16 * k + block_column(i)]);
  };
  float v[8];
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    weigh(v, k);
    const Left<bf16, 3> left(v);
    wgmma_fence();
    wgmma<bf16, OWNED, true>(sum, left.pair[2], by_rows(B, k), k > 0);
    wgmma<bf16, OWNED, true>(sum, left.pair[1], by_rows(B, k), true);
    wgmma_commit();
    wgmma_wait<PARTS<N> == 2 ? 0 : 1>();  // else the compiler runs out of registers
  }
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    weigh(v, k);
    const Left<bf16, 1> left(v);
    wgmma_fence();
    wgmma<bf16, OWNED, true>(sum, left.pair[0], by_rows(B, k), true);
    wgmma_commit();
    wgmma_wait<1>();  // as above
  }
  wgmma_wait<0>();
  hold(sum);
}

// A warpgroup: y and the state of 64 channels of a head.
template <int N>
OM_DEVICE void walk_chunks(const Walk<N>& walk) {
  const SsdScanParams& q = walk.q;
  const Seat& at = walk.at;
  const int slot = walk.slot;
  constexpr int OWNED = OWN<N>;
  const int own = warp_id() % COLUMNS * 16, panels = at.part * walk.OWN_PANELS * TILE_BYTES;
  float S[OWNED / 2] = {}, y[SIDE / 2];
  begin_segment<N>(S, q, at);
#pragma unroll 1
  for (int chunk = walk.first; chunk < walk.last; chunk++) {
    walk.wait_for_stage(chunk);
    unsigned char* stage = walk.stage(chunk);
    const float *steps = walk.steps(stage, at.head), *carry = steps + CARRY * SIDE;
    if (q.states)
      put_state<N>(S, q, at,
                   q.states.at<float>() + ((at.b * walk.chunks + chunk) * q.heads + at.h) * q.headdim * q.state);

    const Rows<bf16, SIDE> x_tile = rows_of(stage + walk.layout.x + slot * TILE_BYTES);
    uint32_t state[OWNED / 16][4];
#pragma unroll
    for (int i = 0; i < OWNED / 4; i++) state[i / 4][i % 4] = pack_two<bf16>(S[2 * i], S[2 * i + 1]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < OWNED / 16; k++)
      wgmma<bf16, SIDE>(y, state[k], by_columns(stage + walk.layout.C + panels, k), k > 0);
    wgmma_commit();  // y^T = S C^T

    wgmma_wait<0>();
    hold(y);
#pragma unroll
    for (int i = 0; i < SIDE / 2; i++) y[i] = scaled(y[i], carry[i / 4 * 8 + state_column(i % 2)]);
    if (PARTS<N> == 2) join_parts<N>(walk, y, chunk);
    const int i = walk.score_index(chunk, at.head);
    mbarrier_wait(walk.signal.ready + i, walk.score_turn(chunk) % 2);
    Block<bf16> x[COLUMNS];
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) x[k] = load_block<true>(x_tile, 16 * k, own);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COLUMNS; k++) wgmma<bf16, SIDE>(y, x[k].pair, by_columns(walk.scores(chunk, at.head), k), true);
    wgmma_commit();  // y^T += x^T M^T
    wgmma_wait<0>();
    hold(y);
    if (lane_id() == 0) mbarrier_arrive(walk.signal.spare + i);  // M is read by the warp's products alone
    if (at.part == 0) store_outputs<N>(walk, y, chunk, slot);
    float gained[OWNED / 2];
    gain<N>(gained, x_tile, steps + WEIGHT * SIDE, stage + panels, own);
    const float end = carry[SIDE - 1];
#pragma unroll
    for (int i = 0; i < OWNED / 2; i++) S[i] = scaled(S[i], end) + gained[i];
    walk.leave_stage(chunk);
  }
  if (at.part == 0 && threadIdx.x % TEAM == 0) bulk_wait_read<0>();
  if (walk.last == walk.chunks)
    put_state<N>(S, q, at, q.final_states.at<float>() + (at.b * q.heads + at.h) * q.headdim * q.state);
}

template <int N>
__global__ void __launch_bounds__((WALK_TEAM + MOST_WALKERS) * TEAM, 1)
    ssd_hopper_walk_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ Cover cover,
                           const __grid_constant__ HopperMemory layout, const __grid_constant__ Maps maps,
                           int chunks_each) {
  OM_SHARED_DYNAMIC(memory);
  OM_SHARED(Signals, signal, 1);
  const int team = warp_id() / (TEAM / WARP);
  if (threadIdx.x == 0) Walk<N>{q, maps, memory, signal[0], layout, 0, 0, cover, chunks_each}.set_up();
  sync_block();
  if (team == FETCH_TEAM) {
    give_registers<FETCH_REGISTERS>();
    const Walk<N> walk{q, maps, memory, signal[0], layout, 0, 0, cover, chunks_each};
    if (threadIdx.x == 0) fetch_chunks<N>(walk);
    if (warp_id() == 1 && q.seq_idx) clean_chunks<N>(walk);
  } else if (team == SCORE_TEAM) {
    give_registers<SCORE_REGISTERS>();
    score_chunks<N>(Walk<N>{q, maps, memory, signal[0], layout, 0, 0, cover, chunks_each});
  } else {
    take_registers<WALK_REGISTERS>();
    const Walk<N> walk{q, maps, memory, signal[0], layout, team - WALK_TEAM, warp_id() % COLUMNS, cover, chunks_each};
    if (walk.at.head < walk.at.live_heads && walk.half() < walk.live_halves) walk_chunks<N>(walk);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

namespace {

template <class Body>
void for_hopper_states(const SsdScanParams& q, Body&& body) {
  if (q.state <= 64) return body(std::integral_constant<int, 64>{});
  if (q.state <= 128) return body(std::integral_constant<int, 128>{});
  body(std::integral_constant<int, 256>{});
}

template <int N>
Cover hopper_cover(const SsdScanParams& q) {
  const int64_t per_group = q.heads / q.groups, wanted = ceil_div(q.headdim, SIDE);
  const int most = MOST_WALKERS / PARTS<N>, halves = wanted > 1 ? most : 1;
  const int heads = halves == 1 && per_group > 1 ? most : 1;
  Cover cover{halves * COLUMNS, heads, PARTS<N>, 0, 0, MOST_STAGES};
  while (cover.stages > 1 && HopperMemory(q, cover, N, OWN<N>).all > q.shared_limit) cover.stages--;
  cover.p_blocks = static_cast<int>(ceil_div(wanted, halves));
  cover.head_blocks = static_cast<int>(ceil_div(per_group, heads));
  return cover;
}

int64_t heads_apart(const SsdScanParams& q) { return apart({&q.x, &q.z, &q.y, &q.ungated}, q.headdim); }
int64_t groups_apart(const SsdScanParams& q) { return apart({&q.B, &q.C}, q.state); }

}  // namespace

bool suits_hopper(const SsdScanParams& q) {
  bool suits = runs_sm90() && q.x.dtype == DType::BF16 && q.headdim >= NARROWEST;
  suits = suits && q.state > 16 && q.state <= 256 && q.state % 2 == 0;
  for (const View* v : {&q.x, &q.z, &q.y, &q.ungated})
    suits = suits && (!*v || suits_bulk(layout_of(*v, q, q.heads, q.headdim, heads_apart(q))));
  for (const View* v : {&q.B, &q.C}) suits = suits && suits_bulk(layout_of(*v, q, q.groups, q.state, groups_apart(q)));
  return suits;
}

int64_t hopper_blocks(const SsdScanParams& q) {
  int64_t blocks = 0;
  for_hopper_states(q, [&](auto states) { blocks = blocks_of(q, hopper_cover<states.value>(q)); });
  return blocks;
}

void launch_hopper_walk(const SsdScanParams& q) {
  for_hopper_states(q, [&](auto states) {
    constexpr int N = states.value;
    const Cover cover = hopper_cover<N>(q);
    const HopperMemory layout(q, cover, N, OWN<N>);
    const int walkers = cover.heads * cover.columns / COLUMNS * cover.parts;
    const Shape shape{grid(q.batch * q.segments * blocks_of(q, cover)), (WALK_TEAM + walkers) * TEAM, q.stream,
                      static_cast<size_t>(layout.all)};
    Maps maps{};
    auto map_of = [&](const View& v, int64_t middle, int64_t columns, int64_t apart) {
      return v ? tensor_map(layout_of(v, q, middle, columns, apart)) : TensorMap{};
    };
    maps.heads_apart = static_cast<int>(heads_apart(q));
    maps.groups_apart = static_cast<int>(groups_apart(q));
    maps.x = map_of(q.x, q.heads, q.headdim, maps.heads_apart);
    maps.z = map_of(q.z, q.heads, q.headdim, maps.heads_apart);
    maps.y = map_of(q.y, q.heads, q.headdim, maps.heads_apart);
    maps.ungated = map_of(q.ungated, q.heads, q.headdim, maps.heads_apart);
    maps.B = map_of(q.B, q.groups, q.state, maps.groups_apart);
    maps.C = map_of(q.C, q.groups, q.state, maps.groups_apart);
    launch<ssd_hopper_walk_kernel<N>>(shape, q, cover, layout, maps, chunks_each(q));
  });
}

#endif

}  // namespace ssd
}  // namespace omnimamba
