// The states between chunks: a ring of slots for each batch row and head. Chunk c reads slot c and writes slot c + 1,
// both modulo the ring. One slot is enough where chunks run one after another, a slab and one where they run side by
// side, all of them where a backward will read them.
#pragma once
#include "pack.h"

namespace omnimamba::ssd {

struct StateRing {
  float* base;
  int64_t slots, heads, floats;
  float* at(int64_t b, int64_t c, int64_t h) const { return base + ((b * slots + c % slots) * heads + h) * floats; }
};

// Whether threads work on chunks side by side rather than on units (batch rows and heads): where dealing out the units
// would leave more than a fifth of the threads' time idle.
inline bool chunks_side_by_side(const SsdScanParams& q, int64_t units) {
  return q.threads > 1 && q.max_chunks > 1 && 4 * round_up(units, q.threads) > 5 * units;
}

// next = decay * state + own, where the chunk continues; the same expression in both schedules, for the same bits.
OM_INLINE vf carried(vf state, float decay, vf own) { return state * splat(decay) + own; }

// carried() for a tile's rows of a panel, and out to one.
template <int Rows>
OM_INLINE void tile_carry(Tile<Rows>& tile, const float* state, float decay) {
  tile_each(tile, [&](int r, int v, vf& acc) { acc = carried(load(state + r * kTileColumns + v * W), decay, acc); });
}
template <int Rows>
OM_INLINE void tile_store(Tile<Rows>& tile, float* out) {
  tile_each(tile, [&](int r, int v, vf& acc) { store(out + r * kTileColumns + v * W, acc); });
}

// One head in one chunk.
struct Unit {
  int64_t b, c, h;  // c counts from the row's first chunk
  int64_t in_slab;  // and from the slab's first
  Chunk chunk;
};

// What a visit to a unit does: everything, or where chunks run side by side first the states, later the rest.
enum class Work { All, States, Rest };

}  // namespace omnimamba::ssd
