// Sizes, and where each intermediate result lies in the workspace.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common/check.h"
#include "../common/tile.h"
#include "ssd_scan.h"

namespace omnimamba::ssd {

constexpr int kChunk = 64;             // positions a chunk at most; the caller cuts by it
constexpr int kBlock = 16;             // positions whose decays share an anchor (decay.h)
constexpr int kRow = kChunk + kBlock;  // floats from row to row of a q-wide matrix: odd in cache lines, so rows spread
constexpr int kSlabChunks = 4;  // chunks a slab and batch row, fewer where batch x groups is large: they stay in L2
constexpr int kHeadBlocks = 4;  // backward: sums over a group's heads are split in at most so many parts
constexpr int kShort = 8;       // positions that the plain recurrence takes at most

static_assert(kChunk % kBlock == 0 && kBlock % W == 0 && kChunk % kTileColumns == 0, "blocks and tiles fill a chunk");
static_assert(kTileRows % 3 == 0 && kChunk % (kTileRows / 3) == 0, "a last tile ends within the chunk");

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Hands out parts of the workspace, each on a cache line. With no memory behind it, it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* at = base_ ? base_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// The sizes that follow from the arguments alone.
struct Sizes {
  explicit Sizes(const SsdScanParams& q)
      : n(static_cast<int>(q.state)),
        p(static_cast<int>(q.headdim)),
        per_group(q.heads / q.groups),
        state_rows(static_cast<int>(round_up(q.state, kTileRows))),
        panels(static_cast<int>((q.headdim + kTileColumns - 1) / kTileColumns)),
        state_panel(int64_t{state_rows} * kTileColumns),
        state_floats(state_panel * panels),
        bc_row(static_cast<int>(round_up(std::max(state_rows, int(round_up(q.state, kTileColumns))), 32) + 16)),
        slab(std::max<int64_t>(
            1, std::min<int64_t>(kSlabChunks, 4 * kSlabChunks / std::max<int64_t>(1, q.batch * q.groups)))) {
    slab = std::min(slab, q.max_chunks);
  }
  int n, p;
  int64_t per_group;  // heads of a group
  int state_rows;     // n, filled up with zero rows
  int panels;         // p in panels of kTileColumns
  int64_t state_panel, state_floats;
  int bc_row;    // floats from row to row of B and C in float32
  int64_t slab;  // chunks a slab
};

struct Chunk {
  int64_t start;
  int length;
  ChunkKind kind;
  int64_t varlen;  // row of varlen_states that this chunk completes, or -1
};

// The chunks of one batch row.
struct Chunks {
  Chunks(const SsdScanParams& q, int64_t b)
      : table(&q.chunks), first(*q.first_chunk.at<int64_t>(b)), count(*q.first_chunk.at<int64_t>(b + 1) - first) {}
  Chunk operator[](int64_t i) const {
    const int64_t* row = table->at<int64_t>(first + i);
    return {row[0], static_cast<int>(row[1]), static_cast<ChunkKind>(row[2]), row[3]};
  }
  const View* table;
  int64_t first, count;
};

// B and C of one chunk and group in float32: by rows [t][n], by columns [n][t], both zero outside; and for the products
// that broadcast them, positions in blocks of states and states in strips (pack.h).
struct GroupPack {
  float *B_rows, *B_columns, *C_positions, *B_states;
  float *C_rows, *C_columns, *B_positions, *C_states;  // the backward's as well
  float* G;                                            // C B^T [t][s], right for s <= t

  void take_rows(Arena& arena, const Sizes& z, bool backward) {
    const int64_t rows = int64_t{kChunk} * z.bc_row, columns = int64_t{z.state_rows} * kRow;
    B_rows = arena.take(rows);
    B_columns = arena.take(columns);
    C_rows = backward ? arena.take(rows) : nullptr;
    C_columns = backward ? arena.take(columns) : nullptr;
  }
  void take_strips(Arena& arena, const Sizes& z, bool backward) {
    const int64_t positions = round_up(z.n, kChunk) * kRow, states = int64_t{kChunk} * z.state_rows;
    C_positions = arena.take(positions);
    B_states = arena.take(states);
    B_positions = backward ? arena.take(positions) : nullptr;
    C_states = backward ? arena.take(states) : nullptr;
    G = arena.take(kRow * kRow);
  }
};

}  // namespace omnimamba::ssd
