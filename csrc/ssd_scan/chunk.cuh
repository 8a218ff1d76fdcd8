// What the scan's CUDA kernels share: chunks, step sizes and decays, how warps share out heads, tiles in shared memory.
//
// A sequence is cut at multiples of CHUNK, whatever sequences are packed into it. For each position of a chunk:
//
//   dt      = clamp(softplus(raw + bias), low, high); 0 in padding and past the end
//   cum_t   = sum of log2(e) dt A up to t, in powers of two, as two floats: high and what it lacks, low
//   L_ts    = 2^(cum_t - cum_s) for s <= t    what is left at t of position s
//   carry_t = 2^cum_t                         what is left at t of the state before the chunk
//   weight_s = dt_s 2^(cum_end - cum_s)       what position s adds to the state after the chunk
//
// The first position of a sequence counts as FLOOR in cum, as does any step that wipes out the state: across it L, carry and
// weight are 0, so that the kernels need no mask but the order of time. Sums are kept in double, their differences exact.
// Where a factor is 0 its product is taken as 0, whatever the other factor: no NaN crosses the beginning of a sequence.
#pragma once
#include "../common/launch.h"
#include "../common/math.cuh"
#include "../common/memory.cuh"
#include "products.cuh"
#include "ssd_scan.h"

namespace omnimamba::ssd {

template <class T>
constexpr int CHUNK = sizeof(T) == 2 ? 64 : 32;
constexpr float FLOOR = -160.0f;
enum Step { DT, HIGH, LOW, CARRY, WEIGHT, STEPS };

OM_HOST_DEVICE constexpr int64_t chunks_of(int64_t length, int chunk) { return (length + chunk - 1) / chunk; }

// c a, and 0 where c is 0.
OM_DEVICE float scaled(float a, float c) { return c == 0.0f ? 0.0f : a * c; }

// How a grid covers the heads. A warp has 16 channels of a head and at most 128 of their states: where there are more, two
// neighbouring warps have a part each. A block has some heads of one group.
struct Cover {
  int columns, heads, parts;  // of a block: 16 channels of a head make a column
  int p_blocks, head_blocks;  // of a head, of a group
  int stages;                 // chunks in shared memory at a time
  OM_HOST_DEVICE int warps() const { return columns * heads * parts; }
};

// Where a warp sits in it.
struct Seat {
  int64_t b, group, h, first_head;  // first_head: of the block
  int head, column, part, p0;       // column: of the block's, over its heads
  int live_heads, segment;
  bool live;  // it has a head and channels of it
};

// blockIdx.x counts blocks of a head's channels, then blocks of heads, groups, segments, batch rows. `column`: of `head`.
OM_DEVICE Seat seat_at(const SsdScanParams& q, const Cover& cover, int segments, int head, int column, int part) {
  uint32_t i = blockIdx.x;
  auto next = [&i](int64_t count) {
    const auto n = static_cast<uint32_t>(count);
    const auto found = static_cast<int>(i % n);
    i /= n;
    return found;
  };
  const int p_block = next(cover.p_blocks), head_block = next(cover.head_blocks);
  Seat at;
  at.group = next(q.groups);
  at.segment = next(segments);
  at.b = i;
  const int per_group = static_cast<int>(q.heads / q.groups), left = per_group - head_block * cover.heads;
  at.first_head = at.group * per_group + head_block * cover.heads;
  at.part = part;
  at.column = head * cover.columns + column;
  at.head = head;
  at.h = at.first_head + at.head;
  at.live_heads = left < cover.heads ? left : cover.heads;
  at.p0 = (p_block * cover.columns + column) * 16;
  at.live = at.head < at.live_heads && at.p0 < q.headdim;
  return at;
}
// `parts` are cover's. As a constant they take fewer registers in one kernel, and more in others.
OM_DEVICE Seat seat_of(const SsdScanParams& q, const Cover& cover, int segments, int parts) {
  const int column = warp_id() / parts;
  return seat_at(q, cover, segments, column / cover.columns, column % cover.columns, warp_id() % parts);
}

// The positions of a chunk that are neither padding nor past the end, a bit each.
template <class T>
OM_DEVICE uint64_t used_bits(const SsdScanParams& q, int64_t b, int64_t chunk) {
  if (q.seq_idx) return static_cast<uint64_t>(*q.used.at<int64_t>(b, chunk));
  const int64_t left = q.length - chunk * CHUNK<T>;
  return left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
}

template <class T>
OM_DEVICE const float* steps_of(const SsdScanParams& q, int64_t b, int64_t h, int64_t chunk) {
  return q.steps.at<float>() + ((b * q.heads + h) * chunks_of(q.length, CHUNK<T>) + chunk) * (STEPS * CHUNK<T>);
}

// `width` elements of a chunk's rows, zeros beyond them and in rows that are not `used`; by `team` threads, this one `me`.
template <class T, int WIDTH>
OM_DEVICE void fetch_rows(const Rows<T, WIDTH>& to, const T* from, int64_t stride, int64_t width, uint64_t used, int me,
                          int team) {
  constexpr int EACH = Rows<T, WIDTH>::EACH, PIECES = Rows<T, WIDTH>::PIECES;
#pragma unroll 2
  for (int i = me; i < CHUNK<T> * PIECES; i += team) {
    const int row = i / PIECES, column = i % PIECES * EACH;
    const bool live = (used >> row & 1) != 0 && column < width;
    copy_async<16>(to.at(row, column), live ? from + row * stride + column : from, live);
  }
}

OM_DEVICE void fetch_floats(float* to, const float* from, int count, int me, int team) {
  for (int i = me * 4; i < count; i += team * 4) copy_async<16>(to + i, from + i);
}

// The states of a warp that are in registers: of N, half where there are two parts. S[j][i] is the state of channel
// p0 + state_row(i) and state part * OWN<N> + 8 j + state_column(i).
template <int N>
constexpr int OWN = N > 128 ? N / 2 : N;
template <int N>
using States = float[OWN<N> / 8][4];
OM_DEVICE int state_row(int i) { return fragment::c(lane_id(), i).row; }
OM_DEVICE int state_column(int i) { return fragment::c(lane_id(), i).column; }

// S[j], also where all are in one array, as a warpgroup's accumulators are.
template <int J>
OM_DEVICE float* four_of(float (&S)[J][4], int j) {
  return S[j];
}
template <int COUNT>
OM_DEVICE float* four_of(float (&S)[COUNT], int j) {
  return S + 4 * j;
}

// each(pair, row, column, count) for the neighbours S[j][2 k], S[j][2 k + 1] that exist: `count` of them.
template <int N, class Held, class Each>
OM_DEVICE void each_pair(Held& S, const SsdScanParams& q, const Seat& at, Each&& each) {
#pragma unroll
  for (int j = 0; j < OWN<N> / 8; j++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int row = at.p0 + state_row(2 * k), column = at.part * OWN<N> + 8 * j + state_column(2 * k);
      const int left = static_cast<int>(q.state) - column;
      if (row < q.headdim && left > 0) each(four_of(S, j) + 2 * k, row, column, left < 2 ? 1 : 2);
    }
}

// S to a contiguous (p, n).
template <int N, class Held>
OM_DEVICE void store_state(Held& S, const SsdScanParams& q, const Seat& at, float* to) {
  const bool even = q.state % 2 == 0;
  each_pair<N>(S, q, at, [&](float* pair, int row, int column, int count) {
    float* out = to + row * q.state + column;
    if (even)
      store_pack(out, Pack<float, 2>{pair[0], pair[1]});
    else
      for (int i = 0; i < count; i++) out[i] = pair[i];
  });
}

// S <- decay S + a contiguous (p, n).
template <int N, class Held>
OM_DEVICE void join_state(Held& S, const SsdScanParams& q, const Seat& at, const float* from, float decay) {
  each_pair<N>(S, q, at, [&](float* pair, int row, int column, int count) {
    const float* in = from + row * q.state + column;
    for (int i = 0; i < count; i++) pair[i] = scaled(pair[i], decay) + in[i];
  });
}

// S <- S + decay times the caller's state.
template <int N, class Held>
OM_DEVICE void join_initial(Held& S, const SsdScanParams& q, const Seat& at, float decay) {
  each_pair<N>(S, q, at, [&](float* pair, int row, int column, int count) {
    for (int i = 0; i < count; i++) pair[i] += scaled(*q.initial_states.at<float>(at.b, at.h, row, column + i), decay);
  });
}

// The state before a segment, S being 0: what the earlier ones left of themselves and of the initial state.
template <int N, class Held>
OM_DEVICE void begin_segment(Held& S, const SsdScanParams& q, const Seat& at) {
  if (q.initial_states) join_initial<N>(S, q, at, 1.0f);
  const int64_t first = (at.b * q.heads + at.h) * (q.segments - 1);
#pragma unroll 1
  for (int64_t i = first; i < first + at.segment; i++)
    join_state<N>(S, q, at, q.ends.at<float>() + i * q.headdim * q.state, q.decays.at<float>()[i]);
}

// S += v B, v a block of 16 channels by 16 positions, from position k on. What enters a state keeps float32's digits: states
// are handed out, and the backward's sums stand on them.
template <class T, int N>
OM_DEVICE void advance(States<N>& S, const float (&v)[8], const Rows<T, N>& B, int part, int k) {
  const Left<T, 3> left(v);
#pragma unroll
  for (int j = 0; j < OWN<N> / 8; j += 2) {
    Right<T> right[2];
    load_rights<true>(right, B, k, part * OWN<N> + 8 * j);
    multiply(S[j], left, right[0]);
    multiply(S[j + 1], left, right[1]);
  }
}

// The position of element i of a block of channels by positions.
OM_DEVICE int block_column(int i) { return fragment::a16(lane_id(), i).column; }

constexpr int OUT_PITCH = 20;  // floats: no bank twice, whole 16 bytes

// Of 16 channels by 16 positions, as two accumulators, the 8 channels from lane % 2 * 8 on of position lane / 2. In fragments
// neighbours are positions, in memory channels. `turn` has 16 * OUT_PITCH floats of shared memory for this warp alone.
OM_DEVICE void turn_block(float (&out)[8], const float (&first)[4], const float (&second)[4], float* turn) {
  side_by_side(out, first, second);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const Place place = fragment::a16(lane_id(), i);
    turn[place.column * OUT_PITCH + place.row] = out[i];
  }
  sync_warp();
  load_floats(out, turn + lane_id() / 2 * OUT_PITCH + lane_id() % 2 * 8);
  sync_warp();
}

// Channels from `channel` on, as far as there are any, of a row of `width`.
template <class T>
OM_DEVICE void put_channels(T* row, int channel, int width, const float (&v)[8]) {
  if (channel + 8 <= width && width * static_cast<int>(sizeof(T)) % 16 == 0) {
    store_floats(row + channel, v);
  } else {
    for (int i = 0; i < 8; i++)
      if (channel + i < width) row[channel + i] = from_float<T>(v[i]);
  }
}

// Offset i of the packed sequences; nothing lies past the end of all.
OM_DEVICE int64_t offset_at(const SsdScanParams& q, int64_t i) {
  const int64_t offset = integer_at(q.cu_seqlens, i);
  return offset < q.length ? offset : q.length;
}
// Where packed sequence i ends; 0 where it has no positions.
OM_DEVICE int64_t sequence_end(const SsdScanParams& q, int64_t i) {
  const int64_t end = offset_at(q, i + 1);
  return end > offset_at(q, i) && end > 0 ? end : 0;
}

// How many packed sequences end at `position` or before.
OM_DEVICE int sequences_before(const SsdScanParams& q, int64_t position) {
  int first = 0, last = static_cast<int>(q.sequences);
  while (first < last) {
    const int middle = (first + last) / 2;
    if (offset_at(q, middle + 1) > position)
      last = middle;
    else
      first = middle + 1;
  }
  return first;
}

}  // namespace omnimamba::ssd
