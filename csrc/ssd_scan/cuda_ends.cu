// The scan's step sizes and decays, and the state at chosen ends of the sequence from what leads up to them.
//
//   steps   dt, cum, carry and weight of each position (chunk.cuh), and which positions are used
//   ends    S at the end of a segment of the sequence that started from nothing, and the decay over it
//   varlen  S after a packed sequence
//
// Plan, steps: a warp has a head and chunk, neighbouring warps neighbouring heads, whose dt share sectors of memory.
// Plan, ends: a warp has 16 channels of a head with their states in registers, and walks chunks backward from the end. A
//   position's weight is its decay to that end, so that nothing is scaled again, and the block stops where a sequence begins
//   or the decay leaves nothing. For steady decay that is after a few chunks.
// Traffic a position and head: steps, dt read and 20 bytes written; ends, x and B once more as far as they reach.
#include "../common/reduce.cuh"
#include "schedule.cuh"

namespace omnimamba {
namespace ssd {
namespace {

constexpr int STEP_WARPS = 8;

template <int CHUNK>
__global__ void __launch_bounds__(STEP_WARPS* WARP, 4) ssd_steps_kernel(const __grid_constant__ SsdScanParams q) {
  constexpr double LOG2E = 1.4426950408889634;
  const int64_t chunks = chunks_of(q.length, CHUNK), head_blocks = ceil_div(q.heads, STEP_WARPS);
  const int64_t h = blockIdx.x % head_blocks * STEP_WARPS + warp_id(), at = blockIdx.x / head_blocks;
  const int64_t chunk = at % chunks, b = at / chunks;
  if (h >= q.heads) return;
  const double A = static_cast<double>(*q.A.at<float>(h));
  const float bias = q.dt_bias ? *q.dt_bias.at<float>(h) : 0.0f;
  float* out = q.steps.at<float>() + ((b * q.heads + h) * chunks + chunk) * (STEPS * CHUNK);
  double cum[CHUNK / WARP], before = 0.0;
  float dt[CHUNK / WARP];
  uint64_t used = 0;
#pragma unroll
  for (int k = 0; k < CHUNK / WARP; k++) {
    const int64_t t = chunk * CHUNK + k * WARP + lane_id();
    bool live = t < q.length, begins = false;
    if (live && q.seq_idx) {
      const int64_t sequence = integer_at(q.seq_idx, b, t);
      begins = sequence != (t > 0 ? integer_at(q.seq_idx, b, t - 1) : 0);
      live = sequence >= 0;
    }
    dt[k] = 0.0f;
    if (live) {
      float v = float_at(q.dt, b, t, h) + bias;
      if (q.dt_softplus) v = softplus(v);
      v = v < q.dt_low ? q.dt_low : v;  // comparisons let a NaN pass
      dt[k] = v > q.dt_high ? q.dt_high : v;
    }
    double a = dt[k] == 0.0f ? 0.0 : static_cast<double>(dt[k]) * A * LOG2E;  // A may be -inf
    if (begins || a < static_cast<double>(FLOOR)) a = static_cast<double>(FLOOR);
    cum[k] = before + warp_scan(a);
    before = shuffle(cum[k], WARP - 1);
    used |= static_cast<uint64_t>(ballot(live)) << 32 * k;
  }
#pragma unroll
  for (int k = 0; k < CHUNK / WARP; k++) {
    const int t = k * WARP + lane_id();
    const auto high = static_cast<float>(cum[k]);
    out[DT * CHUNK + t] = dt[k];
    out[HIGH * CHUNK + t] = high;
    out[LOW * CHUNK + t] = static_cast<float>(cum[k] - static_cast<double>(high));
    out[CARRY * CHUNK + t] = exp2f(high);
    out[WEIGHT * CHUNK + t] = scaled(dt[k], exp2f(static_cast<float>(before - cum[k])));
  }
  if (h == 0 && lane_id() == 0) *q.used.at<int64_t>(b, chunk) = static_cast<int64_t>(used);
}

// A block's piece of the sequence: positions from the start of a chunk to `end`; none where end is 0.
struct Piece {
  int64_t end;
  int first_chunk;
  bool empty;  // a packed sequence without positions, which starts from nothing
};

OM_DEVICE Piece piece_of(const SsdScanParams& q, int which, int chunks_each, int chunk) {
  const int sequence = which - static_cast<int>(q.segments - 1);
  if (sequence < 0) return {(which + int64_t{1}) * chunks_each * chunk, which * chunks_each, false};
  const int64_t end = sequence_end(q, sequence);
  return {end, 0, end == 0 && sequence > 0};
}

template <class T, int N>
__global__ void __launch_bounds__(MOST_THREADS)
    ssd_ends_kernel(const __grid_constant__ SsdScanParams q, const __grid_constant__ Cover cover, int chunks_each) {
  OM_SHARED_DYNAMIC(memory);
  const Layout<T, N> layout(cover);
  const int segments = static_cast<int>(q.segments) - 1;
  const Seat at = seat_of(q, cover, segments + static_cast<int>(q.sequences), cover.parts);
  const Piece piece = piece_of(q, at.segment, chunks_each, CHUNK<T>);
  static_assert(MOST_HEADS == 2);
  States<N> S = {};
  float after[2] = {1.0f, 1.0f};  // after: what is left at the end of each head's state before
  const int me = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  const auto stage = layout.stage(memory, 0);
  const Rows<T, 16> own{stage.x + at.column * layout.x_size};
  bool reaches = !piece.empty;
  for (auto chunk = static_cast<int>(chunks_of(piece.end, CHUNK<T>)) - 1; chunk >= piece.first_chunk; chunk--) {
    const uint64_t used = used_bits<T>(q, at.b, chunk);
    const int64_t row = static_cast<int64_t>(chunk) * CHUNK<T>;
    fetch_rows(stage.B, q.B.at<T>(at.b, row, at.group), q.B.stride[1], q.state, used, me, team);
    for (int head = 0; head < at.live_heads; head++)
      fetch_floats(stage.steps + head * STEPS * CHUNK<T>, steps_of<T>(q, at.b, at.first_head + head, chunk),
                   STEPS * CHUNK<T>, me, team);
    if (at.live && at.part == 0)
      fetch_rows(own, q.x.at<T>(at.b, row, at.h) + at.p0, q.x.stride[1], q.headdim - at.p0, used, lane_id(), WARP);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    const int64_t left = piece.end - row;
    const int last = left < CHUNK<T> ? static_cast<int>(left) - 1 : CHUNK<T> - 1;
    if (at.live) {
      const float* steps = stage.steps + at.head * STEPS * CHUNK<T>;
      const float *dt = steps + DT * CHUNK<T>, *high = steps + HIGH * CHUNK<T>, *low = steps + LOW * CHUNK<T>;
#pragma unroll 1
      for (int k = 0; k <= last; k += 16) {
        float v[8];
        const Block<T> block = load_block<true>(own, k, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int s = k + block_column(i);
          const float power = (high[last] - high[s]) + (low[last] - low[s]);
          const float weight =
              s > last ? 0.0f : scaled(dt[s], power_of_two(power) * (at.head == 0 ? after[0] : after[1]));
          v[i] = scaled(block.value(i), weight);
        }
        advance<T, N>(S, v, stage.B, at.part, k);
      }
    }
    const float* carry = stage.steps + CARRY * CHUNK<T> + last;
    after[0] = scaled(after[0], carry[0]);
    after[1] = at.live_heads == 2 ? scaled(after[1], carry[STEPS * CHUNK<T>]) : 0.0f;
    reaches = !(after[0] == 0.0f && after[1] == 0.0f);
    sync_block();
    if (!reaches) break;
  }
  if (!at.live) return;
  const float left = at.head == 0 ? after[0] : after[1];
  const int64_t size = q.headdim * q.state;
  if (at.segment < segments) {
    const int64_t index = (at.b * q.heads + at.h) * segments + at.segment;
    store_state<N>(S, q, at, q.ends.at<float>() + index * size);
    if (at.p0 == 0 && at.part == 0 && lane_id() == 0) q.decays.at<float>()[index] = left;
  } else {
    if (reaches && q.initial_states) join_initial<N>(S, q, at, left);
    store_state<N>(S, q, at, q.varlen_states.at<float>() + ((at.segment - segments) * q.heads + at.h) * size);
  }
}

}  // namespace

#if !defined(__CUDACC_RTC__)

void launch_steps(const SsdScanParams& q) {
  const bool narrow = q.x.dtype == DType::BF16;
  const int64_t chunks = chunks_of(q.length, narrow ? CHUNK<bf16> : CHUNK<float>);
  const Shape shape{grid(q.batch * chunks * ceil_div(q.heads, STEP_WARPS)), STEP_WARPS * WARP, q.stream};
  if (narrow)
    launch<ssd_steps_kernel<CHUNK<bf16>>>(shape, q);
  else
    launch<ssd_steps_kernel<CHUNK<float>>>(shape, q);
}

void launch_ends(const SsdScanParams& q) {
  const int64_t pieces = q.segments - 1 + q.sequences;
  if (pieces == 0) return;
  for_instance(q, [&](auto type, auto states) {
    using T = decltype(type);
    constexpr int N = states.value;
    const Cover cover = cover_of<T, N>(q);
    const Shape shape{grid(q.batch * blocks_of(q, cover) * pieces), cover.warps() * WARP, q.stream,
                      Layout<T, N>(cover).bytes()};
    launch<ssd_ends_kernel<T, N>>(shape, q, cover, chunks_each(q));
  });
}

#endif

}  // namespace ssd
}  // namespace omnimamba
