// How a block of the scan's backward on Hopper is laid out, what feeds its workers, and who gathers what they sum.
//
// What does not fit, for n 128 where nothing else is said; a block has 232448 bytes and 65536 registers:
//   n 256   dB and dC alone take 128 registers of a worker's 208, beside Y or Z 32, dx 16 and what is read of S 20. Of shared
//           memory B and C take 65536 bytes, two stages 36864, M and dx 16384, a slot each for S and dS' of half of the states
//           65536, the rest 53888: 238208.
//   a gate  dy silu(z) must keep float32's digits for R and T and is the sum of three bf16: two more tiles of a head and, in each
//           stage, z and y before the gate: 49152 bytes more, 279104. At n 64 it would fit, with three times the products of Y, dM.
//   fp16    S and dS' have float32's range, beyond 65504 and below 2^-24, so that their terms must be bf16, and wgmma takes no
//           bf16 beside fp16. An fp16 number is two bf16: x, dy, B and C twice, 65536 bytes more, 295488. The scan of fp16
//           therefore runs in float32, in both directions (cuda.cu, cuda_backward.cu).
#pragma once
#include "back_roles.cuh"
#include "hopper_block.cuh"

namespace omnimamba::ssd {

constexpr int BACK_STAGES = 2, GATHER_SLOTS = 2, WORKERS = 2;  // warpgroups that multiply, after that of FETCH_TEAM
constexpr int WORKER_WARPS = WORKERS * TEAM / WARP, BLOCK_THREADS = (1 + WORKERS) * TEAM;
constexpr int HALF_SIDE = SIDE / 2,
              HALF_BYTES = TILE_BYTES / 2;  // positions that one of the workers has, of a tile's rows

// The tensors as bulk copies see them, as Maps. The states between chunks and those of packed sequences are (n, p, all chunks
// or sequences of all heads) float32.
struct BackMaps {
  TensorMap x, dy, dx, B, C, S, dS, V;
  int heads_apart, groups_apart;
};

// S or dS' of a head in shared memory: panels of 32 states, 64 rows of channels each, their pieces exchanged as bulk copies do.
// Blocks of 16 x 16 of it, channels from 16 k on or states from 16 k on, k known to the compiler, as elements of fragment::a16:
// of what a lane's addresses consist, the part that differs between lanes is computed once.
constexpr int PANEL_STATES = 32, PANEL_BYTES = SIDE * 128;

// Rows of the block are the states from n on, a multiple of 16.
struct TurnedState {
  int lane;
  OM_DEVICE explicit TurnedState(int n)
      : lane(
            n / PANEL_STATES * PANEL_BYTES +
            static_cast<int>(swizzled(lane_id() % 4 * 256 + n % PANEL_STATES * 4 + lane_id() / 4 * 4, Swizzle::B128))) {
  }
  OM_DEVICE float at(const unsigned char* state, int k, int i) const {
    const int odd = i % 2, lower = i / 2 % 2, right = i / 4;  // channel + 1, state + 8, channel + 8
    return *reinterpret_cast<const float*>(state + (lane ^ (odd << 4 | lower << 5)) + 128 * odd + 1024 * right +
                                           2048 * k);
  }
};

// Rows of the block are the channels from p on.
struct PlainState {
  int lane;
  OM_DEVICE explicit PlainState(int p)
      : lane(static_cast<int>(swizzled((p + lane_id() / 4) * 128 + lane_id() % 4 * 8, Swizzle::B128))) {}
  OM_DEVICE Pack<float, 2> at(const unsigned char* state, int k, int i) const {  // elements i and i + 1
    const int lower = i / 2 % 2, right = i / 4;                                  // channel + 8, state + 8
    const unsigned char* panel = state + k / 2 * PANEL_BYTES;
    return load_pack<Pack<float, 2>>(
        reinterpret_cast<const float*>(panel + (lane ^ (right << 5 | k % 2 << 6)) + 1024 * lower));
  }
};

// Sums of a head over its states that become the gradient of its steps; a part of 16 states each.
template <int N>
struct Dots {
  float R[N / 16 * SIDE], U[N / 16 * SIDE], W[N / 16];
};

struct BackSignals {
  Mbarrier group_landed, group_clean;
  Mbarrier landed[BACK_STAGES], clean[BACK_STAGES], empty[BACK_STAGES];
  Mbarrier S_landed[2], S_empty[2], dS_landed[2], dS_empty[2];
  Mbarrier dots_full[GATHER_SLOTS], dots_empty[GATHER_SLOTS], tiles_full[GATHER_SLOTS];
};

// What the warpgroups of a block agree on. Everything that comes round again is counted: of things i = 0, 1, ... thing i is in
// slot i % slots, for the (i / slots)th time.
template <int N>
struct BackBlock {
  static constexpr int PANELS = N / SIDE, STATE_BYTES = N / PANEL_STATES * PANEL_BYTES;
  static constexpr int TILES = SIDE / 16 * (SIDE / 16 + 1) / 2;
  static constexpr int S_SLOTS = N > 64 ? 1 : 2, DS_SLOTS = 2;
  static_assert(BACK_STAGES == 2 && GATHER_SLOTS == 2 && S_SLOTS <= 2 && DS_SLOTS == 2, "set_up");
  // In bytes: tiles of B, C; stages of x, dy and steps; M; dx on its way out; S and dS'; the rest.
  static constexpr int STAGE_STEPS = 2 * TILE_BYTES, STAGE_BYTES = STAGE_STEPS + (STEP_BYTES + 1023) / 1024 * 1024;
  static constexpr int C = PANELS * TILE_BYTES, STAGE = 2 * C, M = STAGE + BACK_STAGES * STAGE_BYTES,
                       OUT = M + TILE_BYTES, S = OUT + TILE_BYTES, DS = S + S_SLOTS * STATE_BYTES,
                       SMALL = DS + DS_SLOTS * STATE_BYTES;
  struct Small {
    StepGradient<bf16> gathered;
    Dots<N> dots[GATHER_SLOTS];
    TileSums tiles[GATHER_SLOTS][TILES];
    float G[TILES][8][WARP], dG[TILES][8][WARP];
    float scratch[WORKER_WARPS][16 * OUT_PITCH];
  };
  static constexpr int BYTES = SMALL + static_cast<int>(sizeof(Small));

  const SsdScanParams& q;
  const BackMaps& maps;
  unsigned char* memory;
  BackSignals& signal;
  Hand at;
  int first, halves, items;           // heads, SIDE channels of one at a time: items are numbered over all of them
  int first_sequence, last_sequence;  // packed ones that end in the chunk
  int chunks;

  OM_DEVICE BackBlock(const SsdScanParams& q, const BackMaps& maps, unsigned char* memory, BackSignals& signal,
                      const BackCover& cover)
      : q(q), maps(maps), memory(memory), signal(signal), chunks(static_cast<int>(chunks_of(q.length, SIDE))) {
    uint32_t rest = blockIdx.x;
    at.part = next_digit(rest, cover.parts);
    at.group = next_digit(rest, q.groups);
    at.chunk = next_digit(rest, chunks);
    at.b = static_cast<int>(rest);
    at.used = used_bits<bf16>(q, at.b, at.chunk);
    at.p0 = at.width = 0;  // of an item: hand_of
    const auto per_group = static_cast<int>(q.heads / q.groups);
    const int left = per_group - at.part * cover.part_heads;
    first = at.group * per_group + at.part * cover.part_heads;
    halves = static_cast<int>(ceil_div(q.headdim, SIDE));
    items = (left < cover.part_heads ? left : cover.part_heads) * halves;
    const int64_t start = int64_t{at.chunk} * SIDE;
    first_sequence = q.dvarlen_states ? sequences_before(q, start) : 0;
    last_sequence = q.dvarlen_states ? sequences_before(q, start + SIDE) : 0;
  }

  OM_DEVICE int head_of(int item) const { return first + item / halves; }
  OM_DEVICE int p0_of(int item) const { return item % halves * SIDE; }
  OM_DEVICE Hand hand_of(int item) const {
    Hand found = at;
    found.p0 = p0_of(item);
    found.width = static_cast<int>(q.headdim) - found.p0;
    return found;
  }
  OM_DEVICE TileSums* tiles_of(int item) const { return small().tiles[item / halves % GATHER_SLOTS]; }
  OM_DEVICE bool begins(int item) const { return item % halves == 0; }
  OM_DEVICE bool ends(int item) const { return item % halves == halves - 1; }
  OM_DEVICE Small& small() const { return *reinterpret_cast<Small*>(memory + SMALL); }
  OM_DEVICE unsigned char* stage(int item) const { return memory + STAGE + item % BACK_STAGES * STAGE_BYTES; }
  OM_DEVICE const float* steps(int item) const { return reinterpret_cast<const float*>(stage(item) + STAGE_STEPS); }
  OM_DEVICE unsigned char* S_of(int item) const { return memory + S + item % S_SLOTS * STATE_BYTES; }
  OM_DEVICE unsigned char* dS_of(int turn) const { return memory + DS + turn % DS_SLOTS * STATE_BYTES; }
  OM_DEVICE float* sums_of(int h) const {
    return q.sums.template at<float>() + ((int64_t{at.b} * chunks + at.chunk) * q.heads + h) * (2 + q.headdim);
  }

  // What was put into slot i % slots for the (i / slots)th time; until that can be put there.
  OM_DEVICE static void wait_full(Mbarrier* full, int i, int slots) { mbarrier_wait(full + i % slots, i / slots % 2); }
  OM_DEVICE static void wait_empty(Mbarrier* empty, int i, int slots) {
    if (i >= slots) mbarrier_wait(empty + i % slots, (i / slots - 1) % 2);
  }
  // All lanes of a warp are done.
  OM_DEVICE static void signal_warp(Mbarrier* bar) {
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(bar);
  }
  OM_DEVICE void wait_for_group() const { mbarrier_wait(q.seq_idx ? &signal.group_clean : &signal.group_landed, 0); }
  OM_DEVICE void wait_for_stage(int item) const {
    wait_full(q.seq_idx ? signal.clean : signal.landed, item, BACK_STAGES);
  }

  // body(sequence or -1, the last position before the state): of the state after the chunk, then of those after packed
  // sequences that end here.
  template <class Body>
  OM_DEVICE void each_state(Body&& body) const {
#pragma unroll 1
    for (int sequence = first_sequence - 1; sequence < last_sequence; sequence++) {
      int last = SIDE - 1;
      const bool own = sequence < first_sequence;
      if (!own) {
        const int64_t end = sequence_end(q, sequence), start = int64_t{at.chunk} * SIDE;
        if (end <= start || end > start + SIDE) continue;
        last = static_cast<int>(end - start) - 1;
      }
      body(own ? -1 : sequence, last);
    }
  }

  OM_DEVICE void set_up() const {
    mbarrier_init(&signal.group_landed, 1);
    mbarrier_init(&signal.group_clean, 1);
    auto set = [](Mbarrier* bars, int count) {
      mbarrier_init(bars, count);
      mbarrier_init(bars + 1, count);
    };
    set(signal.landed, 1);
    set(signal.clean, 1);
    set(signal.empty, WORKER_WARPS + 1);  // the gathering warp reads steps
    set(signal.S_landed, 1);
    set(signal.S_empty, WORKER_WARPS);
    set(signal.dS_landed, 1);
    set(signal.dS_empty, WORKER_WARPS);
    set(signal.dots_full, WORKER_WARPS);
    set(signal.dots_empty, 1);
    set(signal.tiles_full, WORKER_WARPS);
    mbarrier_publish();
  }
};

// One thread: B and C, and then what each head needs, as far as there are free slots.
template <int N>
OM_DEVICE void fetch_heads(const BackBlock<N>& block) {
  using Block = BackBlock<N>;
  const SsdScanParams& q = block.q;
  const BackMaps& maps = block.maps;
  BackSignals& signal = block.signal;
  const int b = block.at.b, t0 = block.at.chunk * SIDE, group = block.at.group;
  const int n0 = group * maps.groups_apart, own_group = maps.groups_apart ? 0 : group;
  mbarrier_arrive_expect(&signal.group_landed, 2 * Block::PANELS * TILE_BYTES);
  for (int panel = 0; panel < Block::PANELS; panel++) {
    unsigned char* to = block.memory + panel * TILE_BYTES;
    tensor_load(to, maps.B, &signal.group_landed, n0 + panel * SIDE, own_group, t0, b);
    tensor_load(to + Block::C, maps.C, &signal.group_landed, n0 + panel * SIDE, own_group, t0, b);
  }
  auto load_state = [](unsigned char* to, const TensorMap& map, Mbarrier* landed, int p0, int64_t row) {
    mbarrier_arrive_expect(landed, Block::STATE_BYTES);
    for (int n = 0; n < N; n += PANEL_STATES)
      tensor_load(to + n / PANEL_STATES * PANEL_BYTES, map, landed, n, p0, static_cast<int>(row));
  };
  int turn = 0;
#pragma unroll 1
  for (int item = 0; item < block.items; item++) {
    const int h = block.head_of(item), p0 = block.p0_of(item);
    const int column = h * maps.heads_apart + p0, own_head = maps.heads_apart ? 0 : h;
    const int64_t row = (int64_t{b} * block.chunks + block.at.chunk) * q.heads + h;
    unsigned char* stage = block.stage(item);
    Mbarrier* landed = signal.landed + item % BACK_STAGES;
    Block::wait_empty(signal.empty, item, BACK_STAGES);
    mbarrier_arrive_expect(landed, 2 * TILE_BYTES + STEP_BYTES);
    tensor_load(stage, maps.x, landed, column, own_head, t0, b);
    tensor_load(stage + TILE_BYTES, maps.dy, landed, column, own_head, t0, b);
    bulk_load(stage + Block::STAGE_STEPS, steps_of<bf16>(q, b, h, block.at.chunk), STEP_BYTES, landed);
    Block::wait_empty(signal.S_empty, item, Block::S_SLOTS);
    load_state(block.S_of(item), maps.S, signal.S_landed + item % Block::S_SLOTS, p0, row);
    block.each_state([&](int sequence, int) {
      Block::wait_empty(signal.dS_empty, turn, Block::DS_SLOTS);
      load_state(block.dS_of(turn), sequence < 0 ? maps.dS : maps.V, signal.dS_landed + turn % Block::DS_SLOTS, p0,
                 sequence < 0 ? row : sequence * q.heads + h);
      turn++;
    });
  }
}

// One warp, where there may be padding: what lies in its rows becomes zeros, before anybody multiplies.
template <int N>
OM_DEVICE void clean_heads(const BackBlock<N>& block) {
  const uint64_t used = block.at.used;
  mbarrier_wait(&block.signal.group_landed, 0);
  clear_padding(block.memory, 2 * block.PANELS, used);
  block.signal_warp(&block.signal.group_clean);
#pragma unroll 1
  for (int item = 0; item < block.items; item++) {
    block.wait_full(block.signal.landed, item, BACK_STAGES);
    clear_padding(block.stage(item), 2, used);
    block.signal_warp(block.signal.clean + item % BACK_STAGES);
  }
}

// One warp: the gradient of the steps, from what the workers have summed.
template <int N>
OM_DEVICE void gather_heads(const BackBlock<N>& block) {
  typename BackBlock<N>::Small& small = block.small();
  BackSignals& signal = block.signal;
  int turn = 0;
#pragma unroll 1
  for (int item = 0; item < block.items; item++) {
    const int h = block.head_of(item), head = item / block.halves;
    const float* dt = block.steps(item) + DT * SIDE;
    if (block.begins(item)) small.gathered.clear();
    block.wait_full(signal.landed, item, BACK_STAGES);
    block.each_state([&](int sequence, int last) {
      const Dots<N>& dots = small.dots[turn % GATHER_SLOTS];
      block.wait_full(signal.dots_full, turn, GATHER_SLOTS);
      small.gathered.add(dots.R, dots.U, dots.W, N / 16, sequence < 0, last, dt);
      block.signal_warp(signal.dots_empty + turn % GATHER_SLOTS);
      turn++;
    });
    if (block.ends(item)) {
      block.wait_full(signal.tiles_full, head, GATHER_SLOTS);
      small.gathered.finish(block.q, block.at.b, h, block.at.chunk, block.tiles_of(item), dt, block.at.used,
                            block.sums_of(h));
    }
    block.signal_warp(signal.empty + item % BACK_STAGES);  // and the sums of this head's tiles have been read
  }
}

}  // namespace omnimamba::ssd
