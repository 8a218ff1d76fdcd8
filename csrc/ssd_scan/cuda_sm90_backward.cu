// The scan's backward on Hopper (sm_90a), every chunk on its own: the second launch of cuda_backward.cu with products of
// warpgroups (wgmma), bulk copies (TMA) and warps of several kinds. The maths stands there:
//
//   dx^T = (dS' B^T) dt tail + dy^T M + D dy^T        dG = sum over heads of dy x^T o L dt
//   Y^T  = S^T dy^T     dC^T = sum of carry Y^T + B^T dG^T     R_t = carry_t C_t . Y_t
//   Z^T  = dS'^T x^T    dB^T = sum of weight Z^T + C^T dG      U_s = tail_s B_s . Z_s
//
// Shapes. bf16 x, dy, dx (b, l, h, p), p from 32 on in eights; B, C (b, l, g, n), n from 20 to 128 in fours; states (b,
//   chunks, h, p, n) float32; no gate. Other calls, and strides that bulk copies do not take, go to cuda_backward.cu.
// Plan. A block has a batch row, a chunk and some heads of a group, one after another, 64 channels at a time. Warpgroups:
//     fetch    one thread issues the copies of heads to come, as far as slots are free; one warp clears padding's rows;
//              one warp gathers the gradient of the steps from what the workers have summed, beside their next products
//     workers  two. Of Y^T and Z^T one has 64 of 128 states, or of 64 states 32 positions; of dx^T, dM and G = C B^T each
//              has 32 positions s. S^T, dS'^T and dS' enter from registers, as three bf16 or one, dy^T too; x, dy, B, C and M by
//              descriptor. Sums over heads of dB and dC stay in registers, dG in shared memory.
//   Nothing in a block waits for all of it, but once at its end: everything is handed over by mbarriers.
// Budget, n 128: B and C 32768; two stages of x, dy, steps 18432; M and dx 8192 each; S 32768, dS' twice 32768; the rest 45632,
//   of which G and dG 20480: 229952 of 232448. n 64: 176672. Registers a thread: fetch 88, workers 208 (dB and dC 64, Y or Z
//   32, dx 16, what is read of S and its three terms 20); as the compiler has no room to mix more, a worker waits for each
//   16 channels of Y and Z, and each 32 states of dx, while the other multiplies.
// Traffic a position and head at p 64, n 128: x, dy and dx 384 bytes, S and dS' 1024, all once (cuda_backward.cu: dS' twice).
// Arithmetic a chunk and head there: 2176 clocks of a multiprocessor's matrix units (768 Y and 768 Z, whose three terms keep
//   float32's digits, 256 dS' B^T, 256 dM, 128 dy^T M), beside 4360 of HBM for 90 KB: it is bound by memory.
// Precision: as in cuda_backward.cu. What does not fit: hopper_back_block.cuh.
#include "../common/device.h"
#include "hopper_back_maps.h"

namespace omnimamba {
namespace ssd {
namespace {

constexpr int FETCH_REGISTERS = 88, WORK_REGISTERS = 208;
static_assert((FETCH_REGISTERS + WORKERS * WORK_REGISTERS) * TEAM <= 65536);
static_assert(BackBlock<128>::BYTES + static_cast<int>(sizeof(BackSignals)) <= 227 << 10);

// A worker: `team` of them, warp `own` of the four.
template <int N>
struct Worker {
  using Block = BackBlock<N>;
  static constexpr int REACH = N > SIDE ? SIDE : HALF_SIDE, TILES = HALF_SIDE / 16;
  static constexpr int AT_ONCE = N > SIDE ? SIDE / 16 : 1;  // what leaves the compiler registers enough
  Block block;
  int team, own;
  int t0, panel, part;  // of Y^T and Z^T: first position, 64 states from panel on, 16 of them the warp's
  int s0;               // of dx^T, dM and G: the first of 32 positions
  int turn = 0;
  float dB[REACH / 2] = {}, dC[REACH / 2] = {};

  OM_DEVICE explicit Worker(const Block& block)
      : block(block), team(warp_id() / (TEAM / WARP) - 1), own(warp_id() % (TEAM / WARP)) {
    t0 = N > SIDE ? 0 : team * HALF_SIDE;
    panel = N > SIDE ? team : 0;
    part = panel * (SIDE / 16) + own;
    s0 = team * HALF_SIDE;
  }
  OM_DEVICE unsigned char* B() const { return block.memory; }
  OM_DEVICE unsigned char* C() const { return block.memory + Block::C; }

  // The warp's tiles that do not lie above the diagonal: of G and of the sum dG over heads each lane has 8 elements, in shared
  // memory, for registers are scarce.
  OM_DEVICE TilePlace tile(int j) const { return {own, team * TILES + j}; }
  OM_DEVICE bool lower(int j) const { return tile(j).J <= tile(j).I; }
  OM_DEVICE float& G(int j, int i) const { return block.small().G[tile_number(own, team * TILES) + j][i][lane_id()]; }
  OM_DEVICE float& dG(int j, int i) const { return block.small().dG[tile_number(own, team * TILES) + j][i][lane_id()]; }

  // G = C B^T: positions t by s.
  OM_DEVICE void start() {
    float found[HALF_SIDE / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; k++)
      wgmma<bf16, HALF_SIDE>(found, by_columns(C(), k), by_columns(B() + team * HALF_BYTES, k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(found);
#pragma unroll
    for (int i = 0; i < HALF_SIDE / 2; i++) {
      if (!lower(i / 8)) continue;
      G(i / 8, i % 8) = found[i];
      dG(i / 8, i % 8) = 0.0f;
    }
  }

  // Y^T = state^T rows^T. Returns <state, other> of the warp's states.
  OM_DEVICE float through(float (&Y)[REACH / 2], const unsigned char* state, const unsigned char* other,
                          const unsigned char* rows) const {
    const TurnedState turned(16 * part);
    float W = 0.0f;
#pragma unroll AT_ONCE
    for (int k = 0; k < SIDE / 16; k++) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        v[i] = turned.at(state, k, i);
        if (other) W += v[i] * turned.at(other, k, i);
      }
      const Left<bf16, 3> left(v);
      wgmma_fence();
#pragma unroll
      for (int term = 2; term >= 0; term--)
        wgmma<bf16, REACH>(Y, left.pair[term], by_columns(rows + t0 * 128, k), k > 0 || term < 2);
      wgmma_commit();
      wgmma_wait<0>();
    }
    hold(Y);
    return W;
  }

  // dC and dB through the states before and after the chunk, and what dx has of the latter.
  OM_DEVICE void through_states(float (&dx)[HALF_SIDE / 2], int item) {
    using Sum = float[REACH / 16][2][4];
    const float *steps = block.steps(item), *dt = steps + DT * SIDE, *carry = steps + CARRY * SIDE;
    const float *high = steps + HIGH * SIDE, *low = steps + LOW * SIDE;
    const unsigned char *S = block.S_of(item), *x = block.stage(item), *dy = x + TILE_BYTES;
    BackSignals& signal = block.signal;
    block.wait_empty(signal.dots_empty, turn, GATHER_SLOTS);
    block.wait_full(signal.S_landed, item, Block::S_SLOTS);
    {
      float Y[REACH / 2];
      through(Y, S, nullptr, dy);
      share_out<REACH>(reinterpret_cast<Sum&>(dC), block.small().dots[turn % GATHER_SLOTS].R + part * SIDE,
                       reinterpret_cast<Sum&>(Y), rows_of(C() + panel * TILE_BYTES), 16 * own, t0,
                       [&](int t) { return Factors{carry[t], carry[t]}; });
    }
    block.each_state([&](int sequence, int last) {
      const unsigned char* dS = block.dS_of(turn);
      Dots<N>& dots = block.small().dots[turn % GATHER_SLOTS];
      auto tail = [&](int s, int last) {
        return s <= last ? power_of_two((high[last] - high[s]) + (low[last] - low[s])) : 0.0f;
      };
      if (sequence >= 0) block.wait_empty(signal.dots_empty, turn, GATHER_SLOTS);
      block.wait_full(signal.dS_landed, turn, Block::DS_SLOTS);
      float Z[REACH / 2];
      const float W = warp_sum(through(Z, dS, S, x));
      share_out<REACH>(reinterpret_cast<Sum&>(dB), dots.U + part * SIDE, reinterpret_cast<Sum&>(Z),
                       rows_of(B() + panel * TILE_BYTES), 16 * own, t0, [&](int s) {
                         const float left = tail(s, last);
                         return Factors{scaled(dt[s], left), left};
                       });
      if (lane_id() == 0 && t0 == 0) dots.W[part] = scaled(W, carry[last]);
      block.signal_warp(signal.dots_full + turn % GATHER_SLOTS);

      const PlainState plain(16 * own);
      float found[HALF_SIDE / 2];
#pragma unroll 2
      for (int k = 0; k < N / 16; k++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          const Pack<float, 2> pair = plain.at(dS, k, i);
          v[i] = pair.value[0];
          v[i + 1] = pair.value[1];
        }
        const Left<bf16, 1> left(v);
        wgmma_fence();
        wgmma<bf16, HALF_SIDE>(found, left.pair[0], by_columns(B() + team * HALF_BYTES, k), k > 0);
        wgmma_commit();
        wgmma_wait<0>();
      }
      hold(found);
      const int end = last + unknown(0);  // else which positions are past it would be kept from above
      block.signal_warp(signal.dS_empty + turn % Block::DS_SLOTS);
#pragma unroll
      for (int i = 0; i < HALF_SIDE / 2; i++) {
        const int s = s0 + i / 4 * 8 + state_column(i % 4);
        dx[i] += scaled(found[i], scaled(dt[s], tail(s, end)));
      }
      turn++;
    });
    block.signal_warp(signal.S_empty + item % Block::S_SLOTS);
  }

  // 16 x 16 numbers from rows `row` and columns `column` of a tile on, from accumulators, transposed.
  OM_DEVICE static void put_turned(unsigned char* tile, int row, int column, const float* v) {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = pack_two<bf16>(v[2 * i], v[2 * i + 1]);
    store_matrices<true>(rows_of(tile).at(row + lane_id() % 8 + lane_id() / 16 * 8, column, lane_id() / 8 % 2 * 8),
                         pair);
  }

  // M of a head, transposed: positions s by t.
  OM_DEVICE void write_scores(const float* steps) const {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      float m[8] = {};
      if (lower(j))
        each_decay(steps, SIDE, tile(j), [&](int half, int i, int, int s, float L) {
          m[4 * half + i] = scaled(G(j, 4 * half + i), scaled(steps[DT * SIDE + s], L));
        });
      put_turned(block.memory + Block::M, 16 * tile(j).J, 16 * own, m);
    }
  }

  // dx through the scores and past the scan, and out.
  OM_DEVICE void finish_dx(float (&dx)[HALF_SIDE / 2], int item) const {
    const SsdScanParams& q = block.q;
    const Rows<bf16, SIDE> dy = rows_of(block.stage(item) + TILE_BYTES);
    const int h = block.head_of(item), p0 = block.p0_of(item);
    const bool leader = threadIdx.x % TEAM == 0;
    write_scores(block.steps(item));
    async_fence();
    sync_named(1 + team, TEAM);
    ssd::Block<bf16> turned[SIDE / 16];
#pragma unroll
    for (int k = 0; k < SIDE / 16; k++) {
      turned[k] = load_block<true>(dy, 16 * k, 16 * own);
      wgmma_fence();
      wgmma<bf16, HALF_SIDE>(dx, turned[k].pair, by_columns(block.memory + Block::M + team * HALF_BYTES, k), true);
    }
    wgmma_commit();
    if (leader) bulk_wait_read<0>();
    wgmma_wait<0>();
    hold(dx);
    sync_named(1 + team, TEAM);  // what the last head left there has gone, and M was read
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      float v[8];
      const ssd::Block<bf16> block_dy = load_block<true>(dy, s0 + 16 * j, 16 * own);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int channel = p0 + 16 * own + state_row(i % 4);
        const float D = q.D && channel < q.headdim ? *q.D.at<float>(h, channel) : 0.0f;
        v[i] = dx[8 * j + i] + D * block_dy.value(i);
      }
      put_turned(block.memory + Block::OUT, s0 + 16 * j, 16 * own, v);
    }
    async_fence();
    sync_named(1 + team, TEAM);
    if (leader) {
      const int apart = block.maps.heads_apart;
      tensor_store(block.maps.dx, block.memory + Block::OUT + team * HALF_BYTES, h * apart + p0, apart ? 0 : h,
                   block.at.chunk * SIDE + s0, block.at.b);
      bulk_commit();
    }
    sync_warp();  // the next product wants its lanes together
  }

  // dM of a head: what it adds to dG, and its sums over tiles.
  OM_DEVICE void through_scores(int item) {
    const float *steps = block.steps(item), *dt = steps + DT * SIDE;
    const unsigned char *x = block.stage(item), *dy = x + TILE_BYTES;
    float dM[HALF_SIDE / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SIDE / 16; k++)
      wgmma<bf16, HALF_SIDE>(dM, by_columns(dy, k), by_columns(x + team * HALF_BYTES, k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(dM);
    // Who gathers has read the head before the last one's sums: else its stage were not free, and this head not here.
    static_assert(GATHER_SLOTS >= BACK_STAGES);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      if (!lower(j)) continue;
      float T[2][4];
      each_decay(steps, SIDE, tile(j), [&](int half, int i, int, int s, float L) {
        const int k = 4 * half + i;
        const float dML = scaled(dM[8 * j + k], L);
        dG(j, k) += scaled(dt[s], dML);
        T[half][i] = scaled(G(j, k), dML);
      });
      sum_tile(T, own == tile(j).J, block.begins(item), dt + tile(j).J * 16,
               block.small().scratch[team * (TEAM / WARP) + own], block.tiles_of(item)[tile_number(own, tile(j).J)]);
    }
    if (block.ends(item)) block.signal_warp(block.signal.tiles_full + item / block.halves % GATHER_SLOTS);
  }

  // dD of a head.
  OM_DEVICE void skip(int item) const {
    const Rows<bf16, SIDE> x = rows_of(block.stage(item)), dy = rows_of(block.stage(item) + TILE_BYTES);
    skip_gradient<bf16>(block.sums_of(block.head_of(item)) + 2, block.hand_of(item), x, 16 * own, 1,
                        [&](int) { return dy; });
  }

  // dB and dC through the scores, summed over heads; then out.
  OM_DEVICE void finish() {
    unsigned char *across = block.memory + Block::M,
                  *turned = block.memory + Block::OUT;  // dG by t and s, and by s and t
    if (threadIdx.x % TEAM == 0) bulk_wait_read<0>();
    sync_named(3, WORKERS * TEAM);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const int row = 16 * own, column = s0 + 16 * j;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = lower(j) ? dG(j, i) : 0.0f;
      put_turned(turned, column, row, v);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const Place place = fragment::c(lane_id(), i % 4);
        put_pair(rows_of(across), row + place.row, column + place.column + i / 4 * 8, v[i], v[i + 1]);
      }
    }
    async_fence();
    sync_named(3, WORKERS * TEAM);
    const Rows<bf16, SIDE> B_tile = rows_of(B() + panel * TILE_BYTES), C_tile = rows_of(C() + panel * TILE_BYTES);
#pragma unroll
    for (int k = 0; k < SIDE / 16; k++) {
      const ssd::Block<bf16> b = load_block<true>(B_tile, 16 * k, 16 * own),
                             c = load_block<true>(C_tile, 16 * k, 16 * own);
      wgmma_fence();
      wgmma<bf16, REACH>(dC, b.pair, by_columns(across + t0 * 128, k), true);
      wgmma<bf16, REACH>(dB, c.pair, by_columns(turned + t0 * 128, k), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(dB);
    hold(dC);
    put(0, dB);
    put(1, dC);
  }

  // dB (0) or dC (1) to the workspace.
  OM_DEVICE void put(int which, const float (&sum)[REACH / 2]) const {
    const SsdScanParams& q = block.q;
    const int64_t row = q.groups * q.state, first = int64_t{block.at.chunk} * SIDE + t0;
    float* out = q.workspace.at<float>() +
                 ((int64_t{2} * block.at.part + which) * q.batch + block.at.b) * q.length * row + first * row +
                 block.at.group * q.state + 16 * part;
    const auto states = static_cast<int>(q.state) - 16 * part;
    const int64_t positions = q.length - first;
#pragma unroll
    for (int i = 0; i < REACH / 2; i++) {
      const int n = state_row(i % 4), t = i / 4 * 8 + state_column(i % 4);
      if (n < states && t < positions) out[t * row + n] = sum[i];
    }
  }
};

template <int N>
OM_DEVICE void work(const BackBlock<N>& block) {
  Worker<N> worker(block);
  // Else the compiler would keep every address from one head to the next.
  auto forget = [&worker, &block] {
    const int nothing = unknown(0);
    worker.block.memory = block.memory + nothing;
    worker.own = warp_id() % (TEAM / WARP) + nothing;
  };
  block.wait_for_group();
  worker.start();
#pragma unroll 1
  for (int item = 0; item < block.items; item++) {
    float dx[HALF_SIDE / 2] = {};
    forget();
    block.wait_for_stage(item);
    worker.through_states(dx, item);
    worker.finish_dx(dx, item);
    worker.through_scores(item);
    if (worker.team == 1 && block.q.D) worker.skip(item);
    block.signal_warp(block.signal.empty + item % BACK_STAGES);
  }
  worker.finish();
}

template <int N>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    ssd_hopper_back_chunk_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ BackCover cover,
                                 const __grid_constant__ BackMaps maps) {
  OM_SHARED_DYNAMIC(memory);
  OM_SHARED(BackSignals, signal, 1);
  if (threadIdx.x == 0) BackBlock<N>{q, maps, memory, signal[0], cover}.set_up();
  sync_block();
  if (warp_id() / (TEAM / WARP) == FETCH_TEAM) {
    give_registers<FETCH_REGISTERS>();
    const BackBlock<N> block{q, maps, memory, signal[0], cover};
    if (threadIdx.x == 0) fetch_heads<N>(block);
    if (warp_id() == 1 && q.seq_idx) clean_heads<N>(block);
    if (warp_id() == 2) gather_heads<N>(block);
  } else {
    take_registers<WORK_REGISTERS>();
    work<N>(BackBlock<N>{q, maps, memory, signal[0], cover});
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

bool suits_hopper_backward(const SsdScanParams& q) {
  bool suits = runs_sm90() && q.x.dtype == DType::BF16 && q.headdim >= NARROWEST && !q.z;
  return suits && q.state > 16 && q.state <= 128 && q.state % 4 == 0 && suits_back_maps(q);
}

void launch_hopper_back_chunks(const SsdScanParams& q, int part_heads, int parts) {
  const int64_t blocks = q.batch * chunks_of(q.length, SIDE) * q.groups * parts;
  const BackMaps maps = back_maps(q);
  auto start = [&](auto states) {
    constexpr int N = states.value;
    const Shape shape{grid(blocks), BLOCK_THREADS, q.stream, BackBlock<N>::BYTES};
    launch<ssd_hopper_back_chunk_kernel<N>>(shape, q, BackCover{part_heads, parts, 1, BACK_STAGES}, maps);
  };
  q.state <= 64 ? start(std::integral_constant<int, 64>{}) : start(std::integral_constant<int, 128>{});
}

#endif

}  // namespace ssd
}  // namespace omnimamba
