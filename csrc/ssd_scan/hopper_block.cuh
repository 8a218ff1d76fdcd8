// How a block of the scan's Hopper kernel is laid out: its warpgroups, its shared memory, its signals.
#pragma once
#include "../common/hopper.cuh"
#include "schedule.cuh"

namespace omnimamba::ssd {

constexpr int TEAM = 128;                     // threads of a warpgroup
constexpr int SIDE = 64, TILE = SIDE * SIDE;  // a tile is 64 rows of 64 elements, 128 bytes
constexpr int TILE_BYTES = TILE * static_cast<int>(sizeof(bf16));
constexpr int COLUMNS = SIDE / 16;  // of 16 channels, one a warp of a walker
constexpr int64_t NARROWEST = 32;   // channels of a head: fewer leave too much of a tile empty
constexpr int MOST_STAGES = 3, MOST_WALKERS = 2, SCORE_BUFFERS = 2;
constexpr int FETCH_TEAM = 0, SCORE_TEAM = 1, WALK_TEAM = 2;  // the first of the walkers
constexpr int STEP_BYTES = STEPS * CHUNK<bf16> * static_cast<int>(sizeof(float));
static_assert(CHUNK<bf16> == SIDE, "a tile holds the positions of a chunk");

// A warp: the rows of tiles whose bit in `used` is not set become zeros, for wgmma to see.
OM_DEVICE void clear_padding(unsigned char* tiles, int count, uint64_t used) {
#pragma unroll 1
  for (int row = 0; row < SIDE && used != ~uint64_t{0}; row++) {
    if (used >> row & 1) continue;
#pragma unroll 1
    for (int i = lane_id(); i < count * 8; i += WARP)
      store_pack(tiles + i / 8 * TILE_BYTES + row * 128 + i % 8 * 16, Pack<unsigned char, 16>{});
  }
  async_fence();
}

// A count of arrivals for each stage, for each head's scores in each of their buffers.
struct Signals {
  Mbarrier landed[MOST_STAGES], clean[MOST_STAGES], empty[MOST_STAGES];
  Mbarrier ready[SCORE_BUFFERS * MOST_HEADS], spare[SCORE_BUFFERS * MOST_HEADS];
};

// The tensors as bulk copies see them: (columns, heads or groups, positions, batch rows). Where tiles fill them up, all heads
// are one row of columns, `apart` for each of them: the driver wants each stride to be a multiple of the one before, and a
// mixer's row is none of a head's.
struct Maps {
  TensorMap x, B, C, z, y, ungated;
  int heads_apart, groups_apart;  // 0: they are a dimension of their own
};

// The shared memory of a block in bytes from its start: stages of a chunk's inputs, M of each head twice, what goes out, and
// y of the second part's states where there is one. Every tile has its 16-byte pieces exchanged as bulk copies and matrix
// products have them, and as Rows<bf16, 64> does. The host counts, so that the kernel finds the numbers in its parameters.
struct HopperMemory {
  int stages, slots, scores_each;  // slots: of 64 channels of a head
  int C, x, z, steps, stage;       // in a stage, and its size
  int scores, output, ungated, partial, all;

  OM_HOST_DEVICE HopperMemory(const SsdScanParams& q, const Cover& cover, int states, int own_states)
      : stages(cover.stages), slots(cover.heads * cover.columns / COLUMNS), scores_each(cover.heads * TILE_BYTES) {
    C = states / SIDE * TILE_BYTES;
    x = 2 * C;
    z = x + slots * TILE_BYTES;
    steps = z + (q.z ? slots * TILE_BYTES : 0);
    stage = (steps + cover.heads * STEP_BYTES + 1023) / 1024 * 1024;
    scores = stages * stage;
    output = scores + SCORE_BUFFERS * scores_each;
    ungated = output + slots * TILE_BYTES;
    partial = ungated + (q.ungated ? slots * TILE_BYTES : 0);
    all = partial + (states > own_states ? TILE * static_cast<int>(sizeof(float)) : 0);
  }
};

OM_DEVICE Rows<bf16, SIDE> rows_of(unsigned char* tile) { return {reinterpret_cast<bf16*>(tile)}; }

// Columns 16 k to 16 k + 15 of rows of tiles side by side, as what is summed over; and 16 rows from 16 k on, as what is summed
// over, of tiles side by side.
OM_DEVICE uint64_t by_columns(const unsigned char* tiles, int k) {
  const int at = k / 4 * TILE_BYTES + k % 4 * 32;
  return matrix_descriptor(shared_address(tiles) + static_cast<uint32_t>(at), 16, 1024, Swizzle::B128);
}
OM_DEVICE uint64_t by_rows(const unsigned char* tiles, int k) {
  return matrix_descriptor(shared_address(tiles) + static_cast<uint32_t>(k) * 2048, TILE_BYTES, 1024, Swizzle::B128);
}

template <int N>
constexpr int PARTS = N / OWN<N>;

// What the warpgroups of a block agree on.
template <int N>
struct Walk {
  const SsdScanParams& q;
  const Maps& maps;
  unsigned char* memory;
  Signals& signal;
  const HopperMemory& layout;
  int halves, live_halves;  // of a head's channels, in the block; that have channels
  int slot;                 // of 64 channels
  Seat at;                  // of a walker's warp, which has 16 of them; of others the block's first
  int first, last, chunks;

  OM_DEVICE Walk(const SsdScanParams& q, const Maps& maps, unsigned char* memory, Signals& signal,
                 const HopperMemory& layout, int walker, int column, const Cover& cover, int chunks_each)
      : q(q), maps(maps), memory(memory), signal(signal), layout(layout) {
    halves = cover.columns > COLUMNS ? 2 : 1;
    slot = walker / PARTS<N>;
    at = seat_at(q, cover, static_cast<int>(q.segments), halves == 2 ? 0 : slot, half() * COLUMNS + column,
                 walker % PARTS<N>);
    const int block_p0 = at.p0 - half() * SIDE - column * 16;
    live_halves = halves == 2 && block_p0 + SIDE < static_cast<int>(q.headdim) ? 2 : 1;
    chunks = static_cast<int>(chunks_of(q.length, SIDE));
    first = at.segment * chunks_each;
    last = first + chunks_each < chunks ? first + chunks_each : chunks;
  }
  OM_DEVICE int half() const { return halves == 2 ? slot : 0; }
  static constexpr int PANELS = N / SIDE, OWN_PANELS = OWN<N> / SIDE;  // tiles side by side

  OM_DEVICE int stage_of(int chunk) const { return (chunk - first) % layout.stages; }
  OM_DEVICE unsigned char* stage(int chunk) const { return memory + stage_of(chunk) * layout.stage; }
  OM_DEVICE const float* steps(const unsigned char* stage, int head) const {
    return reinterpret_cast<const float*>(stage + layout.steps) + head * STEPS * SIDE;
  }
  // Of the phases of a stage's signals: 0 for the first chunk that it holds, 1 for the next ...
  OM_DEVICE int turn_of(int chunk) const { return (chunk - first) / layout.stages % 2; }
  OM_DEVICE void wait_for_stage(int chunk) const {
    Mbarrier* come = q.seq_idx ? signal.clean : signal.landed;
    mbarrier_wait(come + stage_of(chunk), turn_of(chunk));
  }
  // All lanes of a warp are done with the chunk's inputs.
  OM_DEVICE void leave_stage(int chunk) const {
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(signal.empty + stage_of(chunk));
  }
  // M of a head, and how often its buffer was filled before.
  OM_DEVICE int score_index(int chunk, int head) const { return (chunk - first) % SCORE_BUFFERS * MOST_HEADS + head; }
  OM_DEVICE int score_turn(int chunk) const { return (chunk - first) / SCORE_BUFFERS; }
  OM_DEVICE unsigned char* scores(int chunk, int head) const {
    return memory + layout.scores + (chunk - first) % SCORE_BUFFERS * layout.scores_each + head * TILE_BYTES;
  }
  OM_DEVICE int live_walkers() const { return at.live_heads * live_halves * PARTS<N>; }

  OM_DEVICE void set_up() const {
    constexpr int WARPS = TEAM / WARP;
    for (int s = 0; s < layout.stages; s++) {
      mbarrier_init(signal.landed + s, 1);
      mbarrier_init(signal.clean + s, 1);
      mbarrier_init(signal.empty + s, WARPS * (1 + live_walkers()));
    }
    for (int i = 0; i < SCORE_BUFFERS * MOST_HEADS; i++) {
      mbarrier_init(signal.ready + i, TEAM);
      mbarrier_init(signal.spare + i, WARPS * live_halves * PARTS<N>);
    }
    mbarrier_publish();
  }
};

}  // namespace omnimamba::ssd
